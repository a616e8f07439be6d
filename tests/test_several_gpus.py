"""Two processes, each with a simulated GPU: what NCCL would be handed lies on it, steps wait for nothing, results are those of CPUs.

The simulation refuses a collective of tensors on the CPU. DeepSpeed has no part in it: gradients are averaged by hand.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from dnc_dist.config import RunConfig
from dnc_dist.doctor.harness import Outcome
from dnc_dist.doctor.parity import compare
from dnc_dist.doctor.steps import SEED, Plan, _outcome
from dnc_dist.engine import setup, trainer
from dnc_dist.engine.objective import DncObjective
from dnc_dist.engine.trainer import Trainer
from dnc_dist.engine.zero.plain import PlainEngine
from dnc_dist.processes import distributed
from dnc_dist.processes.signals import StopRequest
from tests.engine_fixtures import config, make_dataset
from tests.rounding import EPS
from tests.simulated_device import Device
from tests.spawn import spawn
from tests.step_counts import held

LOSSES: tuple[dict[str, Any], ...] = ({"name": "margin", "learn_beta": "class"}, {"name": "proxy_anchor"}, {"name": "multi_similarity"})
PLAN = Plan({loss["name"]: {"loss": loss} for loss in LOSSES})


class Averaging(PlainEngine):
    """The engine of one process, with the gradients of all."""

    def step(self) -> None:
        """See ``PlainEngine.step``."""
        gradients = [value.grad for group in self.optimizer.param_groups for value in group["params"] if value.grad is not None]
        total = distributed.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients])) / distributed.world_size()
        for gradient, mean in zip(gradients, total.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
        super().step()


def build_engine(objective: DncObjective, cfg: RunConfig) -> PlainEngine:
    """In place of DeepSpeed's, which ``setup.build_engine`` takes for several processes."""
    with mock.patch.object(distributed, "world_size", lambda: 1):
        engine = setup.build_engine(objective, cfg)
    return Averaging(objective, engine.optimizer, clip_gradient=engine.clip_gradient, zero=engine.zero)


class Trained(NamedTuple):
    """Of a run: its result, the loss of each step, and the waits by part: those of steps are in "train"."""

    result: dict[str, Any]
    losses: list[float]
    waits: dict[str, Counter[tuple[str, str]]]


def _train(cfg: RunConfig, on_gpu: bool) -> Trained:
    losses: list[Tensor] = []
    original = PlainEngine.backward

    def backward(engine: PlainEngine, loss: Tensor) -> None:
        losses.append(loss.detach())
        original(engine, loss)

    with ExitStack() as stack:
        simulated = stack.enter_context(Device()) if on_gpu else None
        replaced: list[tuple[Any, str, Any]] = [
            (trainer, "build_engine", build_engine),
            (PlainEngine, "backward", backward),
            (Trainer, "save", lambda self, **how: Path()),  # a checkpoint of several processes is written by DeepSpeed
        ]
        if simulated is not None:
            parts = {"train": (Trainer, "train_epoch"), "log": (trainer.StepLog, "flush")}
            replaced += [(owner, name, simulated.inside(part, getattr(owner, name))) for part, (owner, name) in parts.items()]
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        run = Trainer(cfg, "never", StopRequest())
        result = run.fit()
        run.close()
        waits: dict[str, Counter[tuple[str, str]]] = {}
        for part, what, where in [] if simulated is None else simulated.waits:
            waits.setdefault(part, Counter())[what, where] += 1
        return Trained(result, [float(held(loss)) for loss in losses], waits)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
@pytest.mark.parametrize(
    ("kernels", "changes", "known"),
    [
        ("reference", {"loss": {"name": "margin", "learn_beta": "class"}, "model": {"dropout": 0.3}}, []),
        ("reference", {"loss": {"name": "proxy_anchor"}, "division": {"learners_per_step": 2}}, ["dnc_dist/loss/whole_batch.py"]),
        pytest.param("triton", {"division": {"batches": "groups", "learners_per_step": 2}}, [], marks=pytest.mark.slow),
    ],
    ids=["margin", "proxy_anchor", "triton"],
)
def test_a_run_of_two_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str, changes: dict[str, Any], known: list[str]
) -> None:
    """Divided twice, evaluated after each epoch, with all that a run looks at when it ends."""
    monkeypatch.setenv("DNC_KERNELS", kernels)
    root = make_dataset(tmp_path)
    sections = {"schedule": {"epochs": 3, "batch_size": 12, "samples_per_class": 3}, "tracker": {"log_every": 1000}}
    sections["engine"] = {"precision": "fp32"}
    runs = [config(root, tmp_path / "runs" / place, **sections, **changes) for place in ("gpu", "cpu")]
    found, expected = (spawn(_train, 2, cfg, at == 0) for at, cfg in enumerate(runs))
    for ours, theirs in zip(found, expected, strict=True):
        # The first one is a sum of not more than some thousand terms; later ones pass on what rounding does.
        assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=1000 * EPS)
        assert len(ours.losses) == len(theirs.losses) == 18 and all(map(math.isfinite, ours.losses))
        assert ours.result.keys() == theirs.result.keys()
        assert [where.partition(":")[0] for _, where in ours.waits.get("train", {})] == known


def _steps(on_gpu: bool, dtype: torch.dtype) -> dict[str, Outcome]:
    with Device() if on_gpu else nullcontext():
        groups = distributed.rank_groups(max(PLAN.learners))
        return {str(case): _outcome(PLAN, case, groups, dtype, SEED) for case in PLAN.cases}


def test_steps_of_two_gpus_are_those_of_two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and all gradients, also where a rank has more rows than the other, or none."""
    monkeypatch.setenv("DNC_KERNELS", "reference")
    found, expected, exact = (spawn(_steps, 2, *how)[0] for how in ((True, torch.float32), (False, torch.float32), (False, torch.float64)))
    errors = compare(PLAN, found, expected, exact)
    assert len(errors) == 3 * 2 * 2 * 3
    assert {name: error for name, error in errors.items() if error.share >= 1} == {}
