"""``engine.compile``: the same steps through torch's compiler, with the names, checkpoints and refusals that a run has without it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.data.loading import Batch
from dnc_dist.doctor.harness import in_double
from dnc_dist.engine import compiled
from dnc_dist.engine.compiled import CompiledBackbone
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.objective import DncObjective
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_engine, build_objective, set_learning_rates
from dnc_dist.engine.zero import read_model
from dnc_dist.processes import distributed
from dnc_dist.rundir.checkpoints import Checkpoints
from tests.engine_fixtures import config, damage, division_by_hand, make_dataset
from tests.run_fixtures import make_dataset as make_run_dataset
from tests.run_fixtures import start, without_report, write_config
from tests.spawn import spawn

CPU = torch.device("cpu")
LEVEL = 4
ROUNDING = 1e-10
"""Of float64 values relative to the largest: a sum of some thousand terms in another order is off by 1e-13, another formula by more."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("compile"))


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler follows the network and differentiates it as ever, but runs torch's operators instead of writing code: seconds."""
    torch._dynamo.reset()  # one process makes one objective; it may compile a few kinds of calls
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def prepare(root: Path, compile: bool, **changes: dict[str, Any]) -> tuple[DncObjective, list[Batch]]:
    cfg = config(root, root / "run", engine={"compile": compile, "precision": "fp32"}, **changes)
    data = RunData(cfg)
    objective = build_objective(cfg, data.train.num_classes).train()
    in_double(objective)
    schedule = data.schedule(division_by_hand(data.train.labels, LEVEL), 0, conquer=False)
    return objective, list(data.train_batches(schedule, first_step=0, skip=0))


def outcome(objective: DncObjective, batch: Batch, *, frozen: bool) -> dict[str, Tensor]:
    """Loss and gradients of a step, and what the network is after it."""
    objective.zero_grad()
    loss, _ = objective(batch, Phase(0, LEVEL, conquer=False, backbone_frozen=frozen))
    loss.backward()
    gradients = {f"gradient of {name}": value.grad for name, value in objective.named_parameters() if value.grad is not None}
    return {"loss": loss.detach()} | gradients | objective.state_dict()


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not (value - other[name]).abs().max() <= ROUNDING * other[name].abs().max()]


def test_steps_are_the_same(root: Path, without_code: None) -> None:
    """With global BatchNorm, while the backbone waits, with fewer rows, and in evaluation."""
    (one, batches), (other, _) = (prepare(root, compile) for compile in (True, False))
    assert one.compiled is not None and other.compiled is None
    for batch, frozen in zip(batches, (False, True, False), strict=False):
        found = outcome(one, batch, frozen=frozen)
        assert ("gradient of backbone.blocks.0.0.weight" in found) == (not frozen)
        assert differing(found, outcome(other, batch, frozen=frozen)) == []
        assert not [name for name in found if "orig" in name or "compiled" in name]
    pixels = other._pixels(batches[0].images)[:7]
    assert differing({"features": one.compiled(pixels)}, {"features": other.backbone(pixels)}) == []
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 3
    one.eval(), other.eval()
    with torch.inference_mode():
        assert torch.equal(one.embeddings(batches[0].images), other.embeddings(batches[0].images))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # evaluation compiles nothing


def test_images_that_cannot_be_decoded(root: Path, tmp_path: Path, without_code: None) -> None:
    broken = damage(root, tmp_path / "broken", train=range(0, 72, 9))
    (one, batches), (other, _) = (prepare(broken, compile) for compile in (True, False))
    assert any(not batch.valid.all() for batch in batches)
    for batch in batches:
        assert differing(outcome(one, batch, frozen=False), outcome(other, batch, frozen=False)) == []


def test_global_batch_norm_of_several_processes_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(InputError, match=r"engine\.compile=true cannot compile what processes exchange"):
        prepare(root, True)
    monkeypatch.setattr(compiled, "_check_compiler", lambda device: None)
    prepare(root, True, model={"batch_norm": "frozen"})


class _Asks(nn.Module):
    """Its way depends on values, which no compiled code can."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.detach().sum()) > 0 else -x


def test_a_backbone_that_cannot_be_compiled_is_named(without_code: None) -> None:
    with pytest.raises(RunError, match=r"torch cannot compile this backbone .*; set engine\.compile=false"):
        CompiledBackbone(_Asks(), CPU)(torch.ones(2, 3))


def deepspeed_steps(root: str, place: str) -> dict[bool, tuple[list[float], list[str]]]:
    """Compiled or not -> losses of three steps on several processes, and names of the weights after them."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # this process ends here
    results = {}
    for compile in (True, False):
        changes = {"engine": {"compile": compile, "zero": 1}, "model": {"batch_norm": "frozen"}}
        cfg = config(Path(root), Path(place) / "run", **changes)
        data, losses = RunData(cfg), []
        objective = build_objective(cfg, data.train.num_classes).train()
        engine = build_engine(objective, cfg)
        schedule = data.schedule(division_by_hand(data.train.labels, LEVEL), 0, conquer=False)
        for step, batch in enumerate(data.train_batches(schedule, first_step=0, skip=0)):
            set_learning_rates(engine, {"backbone": 0.0 if step == 1 else 1e-3, "embedding": 1e-3, "masks": 1e-3, "loss": 1e-3})
            loss, stats = engine(batch, Phase(step, LEVEL, conquer=False, backbone_frozen=step == 1))
            engine.backward(loss)
            engine.step()
            losses.append(float(stats["loss"]))
        results[compile] = (losses, list(objective.state_dict()))
    return results


def test_several_processes(root: Path, tmp_path: Path) -> None:
    for found in spawn(deepspeed_steps, 2, str(root), str(tmp_path), timeout=300):
        assert found[True][1] == found[False][1]
        losses, expected = (torch.tensor(found[compile][0], dtype=torch.float64) for compile in (True, False))
        # One step in fp32 is off by some roundings of 2**-24; later ones by what the update makes of them.
        assert len(losses) == len(expected) > 2 and len(set(expected.tolist())) > 2
        assert abs(losses[0] - expected[0]) <= 1e-5 * expected[0]
        assert (losses - expected).abs().max() <= 1e-2 * expected.max()


@pytest.mark.slow
def test_without_a_compiler_nothing_begins(tmp_path: Path) -> None:
    make_run_dataset(tmp_path)
    write_config(tmp_path, tmp_path / "data", "no-compiler", engine={"compile": True})
    # A new process: torch reads the variable once, and the server of the other tests has done so.
    command = [sys.executable, "-m", "dnc_dist", "train", "no-compiler.yaml"]
    environment = os.environ | {"CXX": str(tmp_path / "no-such-compiler")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message.startswith("error: engine.compile=true: torch can compile nothing on this machine (")
    assert "no-such-compiler" in message and message.endswith("or set engine.compile=false")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_goes_on_with_the_other_value(tmp_path: Path) -> None:
    """With the code that the compiler writes; the checkpoints of both hold the same names."""
    make_run_dataset(tmp_path)
    names = []
    for epochs, compile in ((1, True), (2, False)):
        sections = {"engine": {"compile": compile}, "schedule": {"epochs": epochs}, "division": {"conquer_from": None}}
        write_config(tmp_path, tmp_path / "data", "run", **sections)
        done = start(["train", "run.yaml"], tmp_path, before=without_report).wait(900)
        assert done.code == 0 and done.result["epoch"] == epochs, done
        folder = tmp_path / "runs" / "run"
        tag, _ = Checkpoints(folder, 2).choose("last")
        names.append(list(read_model(folder / "checkpoints" / tag).weights))
    assert names[0] == names[1] and not [name for name in names[0] if "orig_mod" in name]
