"""The engine of one process takes DeepSpeed's steps, and each goes on from the other's checkpoints."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dnc_dist.config import RunConfig
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.optimizer import WaitingAdamW
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_engine, build_objective, parameter_groups, set_learning_rates
from dnc_dist.engine.state import TrainState
from dnc_dist.engine.zero import gradient_is_finite, layout, load_checkpoint, prepare_checkpoint, read_model, start_deepspeed
from dnc_dist.engine.zero.plain import PlainEngine
from tests.engine_fixtures import config, division_by_hand, make_dataset
from tests.spawn import spawn

LEARNERS, STEPS = 4, 12
FROZEN, CONQUER = range(3, 6), range(8, STEPS)
RATES = {"backbone": 1e-3, "embedding": 1e-3, "masks": 1e-2, "loss": 1e-3}
ULP = 2.0**-24
"""Largest relative error of one rounding to float32."""
Tensors = dict[str, Tensor]


def both_engines(cfg: RunConfig, num_classes: int) -> dict[str, Any]:
    """DeepSpeed's engine and ours around equal objectives with a parameter that takes part in nothing."""
    engines = {}
    for name in ("deepspeed", "plain"):
        objective = build_objective(cfg, num_classes).train()
        objective.backbone.unused = nn.Parameter(torch.ones(3))
        if name == "plain":
            engines[name] = build_engine(objective, cfg)
        else:
            optimizer = WaitingAdamW(parameter_groups(objective, cfg.optim.weight_decay), betas=cfg.optim.betas)
            engines[name] = start_deepspeed(objective, optimizer, cfg)
    assert isinstance(engines["plain"], PlainEngine) and type(engines["deepspeed"]).__name__ == "DeepSpeedEngine"
    return engines


def take_steps(engine: Any, data: RunData, steps: range) -> list[float]:
    """Losses of these steps: divided, with a waiting backbone in between, and at the end the whole embedding."""
    schedule = data.schedule(division_by_hand(data.train.labels, LEARNERS), 0, conquer=False)
    batches = list(data.train_batches(schedule, first_step=0, skip=0))
    losses = []
    for step in steps:
        phase = Phase(step, LEARNERS, step in CONQUER, step in FROZEN)
        waiting = [name for name, waits in (("backbone", phase.backbone_frozen), ("masks", phase.conquer)) if waits]
        set_learning_rates(engine, {name: 0.0 if name in waiting else rate for name, rate in RATES.items()})
        loss, _ = engine(batches[step % len(batches)], phase)
        engine.backward(loss)
        engine.step()
        assert gradient_is_finite(engine)
        losses.append(loss.item())
    return losses


def written(engine: Any, folder: Path) -> Tensors:
    """What a checkpoint of the engine holds: weights, buffers, and the moments of groups or parameters."""
    folder.mkdir(parents=True)
    prepare_checkpoint(engine, TrainState(step=7), folder, "saved")()
    saved = read_model(folder / "saved")
    assert saved.state.step == 7 and saved.world_size == 1
    found = dict(saved.weights)
    states: dict[int, Tensors] = saved.optimizer
    if engine.zero_optimization_stage():
        assert states == {}
        lengths = [sum(map(torch.numel, group)) for group in partitions(engine)]
        weights, states = layout.cut_partition(folder / "saved", 0, lengths, lengths)
        found |= {f"group {number}": value for number, value in enumerate(weights)}
    return found | {f"{number} {name}": value for number, state in states.items() for name, value in state.items()}


def partitions(engine: Any) -> list[list[Tensor]]:
    return (
        [group["params"] for group in engine.optimizer.param_groups] if isinstance(engine, PlainEngine) else engine.optimizer.bit16_groups
    )


class Found(NamedTuple):
    losses: dict[str, list[float]]
    states: dict[str, Tensors]
    """By engine, after all steps."""
    passed: dict[str, Tensors]
    """By the engine that wrote a checkpoint: what the other one, which had loaded it, wrote then."""
    went_on: dict[str, list[float]]
    """By the engine that loaded a checkpoint of the other one: its losses of the steps after it."""


def compute(root: str, place: str) -> dict[int, Found]:
    """By ZeRO stage."""
    results = {}
    for zero in (0, 1, 2):
        cfg = config(
            Path(root),
            Path(place) / "run",
            engine={"zero": zero},
            optim={"lr": 1e-3, "clip_gradient": 0.0},
            loss={"name": "margin", "learn_beta": "class"},
        )
        data, folder = RunData(cfg), Path(place) / f"zero-{zero}"
        num_classes = data.train.num_classes
        losses, states, passed, went_on = {}, {}, {}, {}
        half, others = STEPS // 2, {"plain": "deepspeed", "deepspeed": "plain"}
        engines, resumed = both_engines(cfg, num_classes), both_engines(cfg, num_classes)
        for name, engine in engines.items():
            losses[name] = take_steps(engine, data, range(half))
            states[f"{name}, half"] = written(engine, folder / f"{name}-half")
            reader, tag = resumed[others[name]], folder / f"{name}-half" / "saved"
            load_checkpoint(reader, tag, read_model(tag))
            passed[name] = written(reader, folder / f"{name}-passed")
            losses[name] += take_steps(engine, data, range(half, STEPS))
            states[name] = written(engine, folder / name)
            went_on[others[name]] = take_steps(reader, data, range(half, STEPS))
        results[zero] = Found(losses, states, passed, went_on)
    return results


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    place = tmp_path_factory.mktemp("plain")
    return spawn(compute, 1, str(make_dataset(place)), str(place), timeout=300)[0]


def differing(one: Tensors, other: Tensors) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def test_the_steps_are_those_of_deepspeed_bit_for_bit(found: dict[int, Found]) -> None:
    """Without clipping, whose factor may be rounded otherwise; losses, weights, moments and counts of steps."""
    at_0 = found[0]
    assert len(set(at_0.losses["plain"])) > STEPS / 2
    assert at_0.losses["plain"] == at_0.losses["deepspeed"]
    assert differing(at_0.states["plain"], at_0.states["deepspeed"]) == []


@pytest.mark.parametrize("zero", [1, 2])
def test_the_stage_does_not_matter_to_one_process(found: dict[int, Found], zero: int) -> None:
    assert found[zero].losses["plain"] == found[0].losses["plain"]


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("writer", ["plain", "deepspeed"])
def test_a_checkpoint_passes_through_the_other_engine_unchanged(found: dict[int, Found], zero: int, writer: str) -> None:
    expected = found[zero].states[f"{writer}, half"]
    assert any("exp_avg_sq" in name for name in expected)
    assert differing(found[zero].passed[writer], expected) == []


@pytest.mark.parametrize("reader", ["plain", "deepspeed"])
def test_a_run_goes_on_with_the_other_engine(found: dict[int, Found], reader: str) -> None:
    assert found[0].went_on[reader] == found[0].losses["plain"][STEPS // 2 :]


def plain_engine(clip: float) -> PlainEngine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    return PlainEngine(module, WaitingAdamW([{"name": "all", "params": list(module.parameters())}], lr=0.1), clip_gradient=clip, zero=1)


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e3])
def test_the_gradient_is_clipped_by_the_norm_of_all_parts(clip: float) -> None:
    engine = plain_engine(clip)
    engine.backward(engine(torch.randn(7, 5)).square().sum())
    raw = torch.cat([parameter.grad.flatten() for parameter in engine.module.parameters()]).double()
    norm = raw.norm()
    engine.step()
    factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
    assert (factor < 1) == (clip == 1e-3)
    # After the first step Adam's first moment is the gradient times 1 - 0.9.
    moments = torch.cat([engine.optimizer.state[parameter]["exp_avg"].flatten() for parameter in engine.module.parameters()])
    # Each product and sum of the norm rounds once; then the factor, the clipped value, 1 - 0.9 and the moment.
    allowed = (len(raw) + 8) * ULP
    assert ((moments.double() - 0.1 * factor * raw).abs() <= allowed * 0.1 * factor * raw.abs()).all()
    assert abs(engine.gradient_norm.double() - norm) <= len(raw) * ULP * norm


def test_gradients_of_several_backward_passes_add_up() -> None:
    images = torch.randn(6, 5)
    at_once, in_parts = plain_engine(1.0), plain_engine(1.0)
    at_once.backward(at_once(images).square().sum())
    for part in images.split(2):
        in_parts.backward(in_parts(part).square().sum())
    at_once.step()
    in_parts.step()
    # The sums of six rows are rounded in another order.
    assert in_parts.gradient_norm.item() == pytest.approx(at_once.gradient_norm.item(), rel=100 * ULP)
    assert all(parameter.grad is None for parameter in in_parts.module.parameters())  # the next step begins with none


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_seen(value: float, clip: float) -> None:
    engine = plain_engine(clip)
    engine.module[1].bias.register_hook(lambda grad: grad + value)
    engine.backward(engine(torch.randn(2, 5)).sum())
    engine.step()
    assert not gradient_is_finite(engine)


def test_the_names_in_files_are_those_of_deepspeed() -> None:
    from deepspeed.checkpoint import constants

    for name in ("OPTIMIZER_STATE_DICT", "BASE_OPTIMIZER_STATE", "SINGLE_PARTITION_OF_FP32_GROUPS"):
        assert getattr(layout, name) == getattr(constants, name)


def test_deepspeed_is_imported_only_where_its_engine_is_made() -> None:
    """It takes seconds, which one process and the use of a trained model save."""
    eager = []
    for path in Path(layout.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            if any(name.split(".")[0] == "deepspeed" or name == "dnc_dist.engine.zero.files" for name in names):
                eager.append(path.name)
    assert eager == ["files.py"]


def test_one_process_starts_without_deepspeed_and_without_torchs_compiler() -> None:
    """Each takes seconds to import, and torch imports its compiler unasked at the first call of an optimizer."""
    code = """
        import sys
        import torch
        import dnc_dist.engine.trainer
        from dnc_dist.engine.optimizer import WaitingAdamW
        from dnc_dist.engine.zero.plain import PlainEngine

        module = torch.nn.Linear(5, 3)
        optimizer = WaitingAdamW([{"name": "all", "params": list(module.parameters())}], lr=0.1)
        engine = PlainEngine(module, optimizer, clip_gradient=1.0, zero=0)
        engine.backward(engine(torch.randn(4, 5)).sum())
        engine.step()
        optimizer.load_state_dict(optimizer.state_dict())
        print({"deepspeed", "torch._dynamo"} & set(sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_deepspeed_starts_without_torchs_compiler(zero: int) -> None:
    """With ZeRO it would import that, at its start and in a backward pass, for an optimizer that asks to be compiled."""
    code = f"""
        import sys
        import torch
        import dnc_dist.engine.trainer
        from dnc_dist.config import parse_tree
        from dnc_dist.engine.optimizer import WaitingAdamW
        from dnc_dist.engine.zero import start_deepspeed
        from dnc_dist.processes import distributed

        distributed.init(timeout_seconds=60)
        compiled = torch.compile
        module = torch.nn.Linear(5, 3)
        optimizer = WaitingAdamW([{{"name": "all", "params": list(module.parameters())}}], lr=0.1)
        engine = start_deepspeed(module, optimizer, parse_tree({{"data": {{"root": "none"}}, "engine": {{"zero": {zero}}}}}, "test"))
        engine.backward(engine(torch.randn(4, 5)).sum())
        engine.step()
        print(type(engine).__name__, "torch._dynamo" in sys.modules, torch.compile is compiled)
    """
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "DeepSpeedEngine False True"
