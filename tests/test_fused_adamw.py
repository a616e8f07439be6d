"""AdamW in one kernel, as a GPU takes it: the same updates as in many, and its step counts lie where it reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnc_dist.engine.optimizer import WaitingAdamW
from dnc_dist.engine.setup import build_engine, build_objective, parameter_groups
from dnc_dist.engine.state import TrainState
from dnc_dist.engine.zero import gradient_is_finite, load_checkpoint, prepare_checkpoint, read_model, start_deepspeed
from dnc_dist.engine.zero.plain import PlainEngine
from tests.engine_fixtures import config, make_dataset
from tests.simulated_device import DEVICE, Device
from tests.spawn import spawn
from tests.step_counts import held

STEPS, RATE, DECAY, BETA2 = 60, 1e-2, 0.1, 0.999
SIZES = {"first": [(5, 3), (7,)], "waits": [(4, 4)]}
HALF_ULP = 2.0**-53
"""Largest relative error of one rounding to float64."""


def optimizer_of(parameters: dict[str, list[nn.Parameter]], *, fused: bool | None) -> WaitingAdamW:
    groups = [{"name": name, "params": members, "weight_decay": DECAY} for name, members in parameters.items()]
    return WaitingAdamW(groups, lr=RATE, betas=(0.9, BETA2), fused=fused)


def take_steps(parameters: dict[str, list[nn.Parameter]], optimizer: WaitingAdamW, steps: range) -> None:
    """Gradients of 1 to 2, of either sign; one group waits at the start and in between."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if group["name"] == "waits" and (step < 5 or 20 <= step < 30) else RATE * (1 + step) / STEPS
            for parameter in group["params"]:
                size = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) + 1
                parameter.grad = size * (torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1)
        optimizer.step()


def fresh(dtype: torch.dtype = torch.float64) -> dict[str, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return {name: [nn.Parameter(torch.randn(size, generator=generator, dtype=dtype)) for size in sizes] for name, sizes in SIZES.items()}


def bound() -> float:
    """How far roundings alone may move a parameter.

    A moment is a sum of ``STEPS`` terms with a few roundings each, of gradients up to 2, over a root of second moments of 1 at least:
    an update of at most 2 * RATE is wrong by less than 16 * STEPS of them. The correction 1 - beta**t is of size 1 - beta at least, so a
    last digit of beta**t counts 1 / (1 - beta) times there. The parameter itself is rounded a few times in a step; it is as large as at
    the start and all updates together at most.
    """
    largest = max(float(value.detach().abs().max()) for group in fresh().values() for value in group) + 2 * RATE * STEPS
    return HALF_ULP * STEPS * (2 * RATE * (16 * STEPS + 2 / (1 - BETA2)) + 4 * largest)


def difference(one: dict[str, list[nn.Parameter]], other: dict[str, list[nn.Parameter]]) -> float:
    return max(float((a - b).detach().abs().max()) for name in one for a, b in zip(one[name], other[name], strict=True))


def test_one_kernel_takes_the_steps_of_many() -> None:
    default, fused = fresh(), fresh()
    optimizers = optimizer_of(default, fused=None), optimizer_of(fused, fused=True)
    for parameters, optimizer in zip((default, fused), optimizers, strict=True):
        take_steps(parameters, optimizer, range(STEPS))
    assert difference(default, fresh()) > 0.1  # they moved far
    assert difference(default, fused) <= bound()
    for optimizer in optimizers:
        counts = {group["name"]: {float(optimizer.state[p]["step"]) for p in group["params"]} for group in optimizer.param_groups}
        assert counts == {"first": {float(STEPS)}, "waits": {STEPS - 15.0}}


@pytest.mark.parametrize("fused", [None, True])
def test_a_state_goes_on_with_the_other_kind(fused: bool | None) -> None:
    alone, passed = fresh(), fresh()
    take_steps(alone, optimizer_of(alone, fused=fused), range(STEPS))
    writer, reader = optimizer_of(passed, fused=fused), optimizer_of(passed, fused=None if fused else True)
    take_steps(passed, writer, range(STEPS // 2))
    reader.load_state_dict(reader.state_dict() | {"state": writer.state_dict()["state"]})
    assert [group["fused"] for group in reader.param_groups] == 2 * [None if fused else True]
    take_steps(passed, reader, range(STEPS // 2, STEPS))
    assert difference(alone, passed) <= bound()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_seen(value: float) -> None:
    module = nn.Linear(5, 4)
    optimizer = WaitingAdamW([{"name": "all", "params": list(module.parameters())}], lr=0.1, fused=True)
    engine = PlainEngine(module, optimizer, clip_gradient=0.0, zero=1)
    engine.backward(engine(torch.randn(2, 5)).sum())
    engine.step()
    assert gradient_is_finite(engine) and optimizer.largest_square().isfinite()
    module.bias.register_hook(lambda grad: grad + value)
    engine.backward(engine(torch.randn(2, 5)).sum())
    engine.step()
    assert not gradient_is_finite(engine) and not optimizer.largest_square().isfinite()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("fused"))


def engine_of(root: Path, place: Path, zero: int) -> PlainEngine:
    cfg = config(root, place, engine={"zero": zero, "precision": "fp32"})
    engine = build_engine(build_objective(cfg, 6), cfg)
    assert isinstance(engine, PlainEngine)
    return engine


def step(engine: PlainEngine, waiting: str = "") -> None:
    for number, group in enumerate(engine.optimizer.param_groups):
        group["lr"] = 0.0 if group["name"] == waiting else 1e-2
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, number + 1)
    engine.step()


def states(engine: PlainEngine) -> list[dict[str, Tensor]]:
    """By parameter, on the CPU."""
    return [
        {name: held(value) for name, value in engine.optimizer.state[parameter].items()}
        for group in engine.optimizer.param_groups
        for parameter in group["params"]
    ]


def differing(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> list[Any]:
    assert len(one) == len(other)
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in one + other)
    return [(at, name) for at, state in enumerate(one) for name, value in state.items() if not torch.equal(value, other[at][name])]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
@pytest.mark.parametrize("zero", [0, 1])
def test_a_gpu_takes_one_kernel_a_group_and_goes_on_from_a_checkpoint_of_the_cpu(root: Path, tmp_path: Path, zero: int) -> None:
    before = engine_of(root, tmp_path / "run", zero)
    assert [group["fused"] for group in before.optimizer.param_groups] == 3 * [None]  # the CPU computes as it did
    step(before)
    step(before, waiting="masks")
    (tmp_path / "saved").mkdir()
    prepare_checkpoint(before, TrainState(step=2), tmp_path / "saved", "last")()
    with Device() as simulated:
        engine = engine_of(root, tmp_path / "run", zero)
        step(engine, waiting="backbone")
        assert {value.device for state in engine.optimizer.state.values() for value in state.values()} == {DEVICE}
        load_checkpoint(engine, tmp_path / "saved" / "last", read_model(tmp_path / "saved" / "last"))
        assert {value.device for state in engine.optimizer.state.values() for value in state.values()} == {DEVICE}
        assert differing(states(engine), states(before)) == []
        simulated.forget()
        step(engine, waiting="masks")
        counts = simulated.launches["elsewhere"]
        assert counts["_fused_adamw_"] == counts["_foreach_add_"] == 2
        after = states(engine)
    step(before, waiting="masks")
    assert [int(state["step"]) for state in after] == [int(state["step"]) for state in states(before)]
    assert len({int(state["step"]) for state in after}) == 2  # the masks have waited


def deepspeed_weights(root: str, place: str) -> dict[int, list[list[Tensor]]]:
    """Stage -> weights before and after steps of a fused optimizer under DeepSpeed: undisturbed, and through a checkpoint in between."""
    results = {}
    for zero in (0, 1, 2):
        cfg = config(Path(root), Path(place) / "run", engine={"zero": zero, "precision": "fp32"})
        ends = [[value.detach().clone() for value in build_objective(cfg, 6).parameters()]]
        for resumes in (False, True):
            engine = None
            for part in range(2):
                if part == 0 or resumes:
                    written, objective = engine, build_objective(cfg, 6)
                    groups = parameter_groups(objective, cfg.optim.weight_decay)
                    engine = start_deepspeed(objective, WaitingAdamW(groups, betas=cfg.optim.betas, fused=True), cfg)
                    if written is not None:
                        folder = Path(place) / f"zero-{zero}"
                        folder.mkdir()
                        prepare_checkpoint(written, TrainState(step=2), folder, "last")()
                        load_checkpoint(engine, folder / "last", read_model(folder / "last"))
                for waits in ("masks", "backbone"):
                    for group in engine.optimizer.param_groups:
                        group["lr"] = 0.0 if group["name"] == waits else 1e-2
                    engine.backward(sum((part + 1) * (value - 2).square().sum() for value in engine.module.parameters()))
                    engine.step()
            ends.append([value.detach().clone() for value in engine.module.parameters()])
        results[zero] = ends
    return results


@pytest.mark.slow  # several starts of DeepSpeed
def test_deepspeed_takes_a_fused_optimizer_through_a_checkpoint(root: Path, tmp_path: Path) -> None:
    found = spawn(deepspeed_weights, 1, str(root), str(tmp_path), timeout=300)[0]
    for begin, undisturbed, resumed in found.values():
        assert not any(torch.equal(one, other) for one, other in zip(begin, undisturbed, strict=True))
        assert all(torch.equal(one, other) for one, other in zip(undisturbed, resumed, strict=True))
