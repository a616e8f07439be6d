"""On a GPU the weights of convolutions lie in memory as the images do; nothing that is saved or computed depends on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dnc_dist.embedder import Embedder, Exported
from dnc_dist.engine.network import EmbeddingNetwork, of_network
from dnc_dist.engine.optimizer import WaitingAdamW
from dnc_dist.engine.setup import build_objective, parameter_groups
from dnc_dist.engine.state import TrainState
from dnc_dist.engine.zero import load_checkpoint, prepare_checkpoint, read_model
from dnc_dist.engine.zero.plain import PlainEngine
from dnc_dist.inference.export import export
from tests.engine_fixtures import config, make_dataset
from tests.simulated_device import Device
from tests.step_counts import held

LAYOUTS = {"images": torch.channels_last, "plain": torch.contiguous_format}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("layout"))


def lies_as_images(value: Tensor) -> bool:
    return value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous()


def engine_of(root: Path, place: Path, layout: str, zero: int = 0, shift: float = 0.0) -> PlainEngine:
    """On the CPU, with its weights as a GPU has them, or as they are on a CPU."""
    cfg = config(root, place, engine={"zero": zero})
    objective = build_objective(cfg, 6)
    for layer in objective.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=LAYOUTS[layout])
    with torch.no_grad():
        for value in objective.parameters():
            value += shift
    optimizer = WaitingAdamW(parameter_groups(objective, cfg.optim.weight_decay), lr=1e-2, fused=True)
    return PlainEngine(objective, optimizer, clip_gradient=0.0, zero=zero)


def step(engine: PlainEngine) -> None:
    engine.backward(sum(value.pow(3).sum() for value in engine.module.parameters()))
    engine.step()


def differing(one: PlainEngine, other: PlainEngine) -> list[str]:
    """Names of weights and moments that are not bit-equal."""
    weights = other.module.state_dict()
    found = [name for name, value in one.module.state_dict().items() if not torch.equal(value, weights[name])]
    own, others = (engine.optimizer.state_dict()["state"] for engine in (one, other))
    assert own.keys() == others.keys() and own
    return found + [
        f"{number} {name}" for number in own for name, value in own[number].items() if not torch.equal(value, others[number][name])
    ]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_a_gpu_has_them_so_and_the_cpu_as_before(root: Path, tmp_path: Path) -> None:
    cfg = config(root, tmp_path / "run")
    here = build_objective(cfg, 6).state_dict()
    assert not any(lies_as_images(value) for value in here.values())
    with Device():
        there = {name: held(value) for name, value in build_objective(cfg, 6).state_dict().items()}
    convolutions = [name for name, value in here.items() if value.dim() == 4]
    assert len(convolutions) == 4
    assert [name for name, value in there.items() if lies_as_images(value)] == convolutions
    assert here.keys() == there.keys() and all(torch.equal(value, there[name]) for name, value in here.items())


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("writer", LAYOUTS)
def test_a_checkpoint_goes_on_in_the_other_layout(root: Path, tmp_path: Path, writer: str, zero: int) -> None:
    (reader,) = LAYOUTS.keys() - {writer}
    first = engine_of(root, tmp_path / "run", writer, zero)
    step(first)
    (tmp_path / "saved").mkdir()
    prepare_checkpoint(first, TrainState(step=1), tmp_path / "saved", "last")()
    engines = [engine_of(root, tmp_path / "run", layout, zero, shift=0.5) for layout in (reader, writer)]
    for engine in engines:
        load_checkpoint(engine, tmp_path / "saved" / "last", read_model(tmp_path / "saved" / "last"))
        assert differing(engine, first) == []
        for parameter, state in engine.optimizer.state.items():
            assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == parameter.stride()
    assert any(map(lies_as_images, engines[0].module.state_dict().values())) == (reader == "images")
    # The same layout goes on to the last bit.
    step(first)
    step(engines[1])
    assert differing(engines[1], first) == []


def test_an_export_is_the_same_file(root: Path, tmp_path: Path) -> None:
    cfg = config(root, tmp_path / "run")
    files, numbers = [], []
    for layout in LAYOUTS:
        objective = engine_of(root, tmp_path / "run", layout).module
        assert isinstance(objective, EmbeddingNetwork)
        network = EmbeddingNetwork(objective.backbone, objective.head, objective.masks, objective.augment, autocast=None)
        assert network.state_dict().keys() == of_network(objective.state_dict()).keys()
        assert any(map(lies_as_images, network.state_dict().values())) == (layout == "images")
        model = Embedder(network, cfg, tmp_path, Exported("run", "last", 1, 4), torch.device("cpu"), None)
        export(model, tmp_path / layout, onnx=False, tell=print)
        files.append((tmp_path / layout / "model.safetensors").read_bytes())
        numbers.append(model.fingerprint)
    assert files[0] == files[1] and numbers[0] == numbers[1]
