"""Backbones by name, their weights, the embedding layer."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch

from dnc_dist.base import parts, torchvision_guard
from dnc_dist.base.errors import InputError
from dnc_dist.model.backbone import build_backbone
from dnc_dist.model.batch_norm import FrozenBatchNorm2d, GlobalBatchNorm2d
from dnc_dist.model.embedding import EmbeddingHead
from tests.process_server import SERVER
from tests.rounding import EXACT


def test_conv4_shapes_and_poolings() -> None:
    images = torch.randn(2, 3, 32, 32)
    built = {pooling: build_backbone("conv4", "none", batch_norm="global", pooling=pooling).eval() for pooling in ("avg", "max", "avg+max")}  # type: ignore[arg-type]
    features = {}
    for pooling, network in built.items():
        network.load_state_dict(built["avg"].state_dict())
        features[pooling] = network(images)
    assert features["avg"].shape == (2, 256) and built["avg"].feature_dim == 256
    torch.testing.assert_close(features["avg"] + features["max"], features["avg+max"])
    assert sum(isinstance(module, GlobalBatchNorm2d) for module in built["avg"].modules()) == 4
    assert build_backbone("conv4", "none", batch_norm="frozen")(torch.randn(1, 3, 16, 16)).shape == (1, 256)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "test_vit", "test_convnext"])
def test_timm_models_of_every_output_layout(name: str) -> None:
    network = build_backbone(name, "none", batch_norm="global", pooling="avg+max")
    size = network.network.pretrained_cfg["input_size"][-1] if "vit" in name else 64  # type: ignore[union-attr,index]
    features = network.train()(torch.randn(2, 3, size, size))
    assert features.shape == (2, network.feature_dim)
    features.sum().backward()
    assert not any(type(module).__name__ in ("BatchNorm2d", "BatchNormAct2d") for module in network.modules())


@pytest.mark.parametrize("kind", ["frozen", "global"])
def test_timm_conversion_computes_what_timm_computes(kind: Literal["frozen", "global"]) -> None:
    network = build_backbone("mobilenetv3_small_050", "none", batch_norm=kind)
    assert any(isinstance(child, FrozenBatchNorm2d if kind == "frozen" else GlobalBatchNorm2d) for child in network.modules())
    import timm

    plain = timm.create_model("mobilenetv3_small_050", num_classes=0, global_pool="")
    plain.load_state_dict(network.network.state_dict())  # type: ignore[union-attr]
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    maps = plain.double().train(kind == "global")(images)
    torch.testing.assert_close(network.double().train()(images), maps.mean((2, 3)), rtol=EXACT, atol=EXACT)


def test_unknown_name_suggests_close_ones() -> None:
    with pytest.raises(InputError, match=r"model\.backbone=resnet5O .*did you mean resnet50"):
        build_backbone("resnet5O", "none", batch_norm="frozen")


def test_weights_from_a_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    network = build_backbone("conv4", "none", batch_norm="global")
    wrapped = {"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()} | {"fc.weight": torch.ones(2, 256)}}
    torch.save(wrapped, tmp_path / "w.pth")
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        other = build_backbone("conv4", str(tmp_path / name), batch_norm="frozen")
        assert all(torch.equal(value, network.state_dict()[key]) for key, value in other.state_dict().items())


def renamed(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A classifier after the same tensors under names of somebody else, as a file of another project has them."""
    names = {"blocks.": "_layer", ".0.": "_conv.", ".1.": "_norm."}
    state = {}
    for key, value in network.state_dict().items():
        for old, new in names.items():
            key = key.replace(old, new) if old == "blocks." else key.replace(old, new, 1)
        state[key] = value
    return state | {"_fc.weight": torch.ones(2, 256), "_fc.bias": torch.ones(2)}


def test_weights_under_other_names_are_taken_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    network = build_backbone("conv4", "none", batch_norm="global")
    for value in network.state_dict().values():
        value.copy_(torch.rand_like(value, dtype=torch.float32))
    state = renamed(network)
    assert not set(state) & set(network.state_dict())
    torch.save(state, tmp_path / "theirs.pth")
    other = build_backbone("conv4", str(tmp_path / "theirs.pth"), batch_norm="global")
    counts = [key for key in network.state_dict() if key.endswith("num_batches_tracked")]
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in network.state_dict().items() if key not in counts)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network.eval()(images), other.eval()(images))
    assert caplog.messages == [
        f"model.weights={tmp_path / 'theirs.pth'} has other names than model.backbone=conv4: its 20 tensors were taken in their order, "
        f"shapes and kinds agree (blocks.0.0.weight from {next(iter(state))}, blocks.0.1.weight from {list(state)[1]}, "
        f"blocks.3.1.running_var from {list(state)[-4]}); left over: _fc.weight, _fc.bias"
    ]


def swapped(state: dict[str, torch.Tensor], one: int, other: int) -> dict[str, torch.Tensor]:
    items = list(state.items())
    items[one], items[other] = items[other], items[one]
    return dict(items)


OTHER_NETS = {
    "another order of layers": (lambda state: swapped(state, 6, 12), r"in order number 5 is no pair: .* differ in shape"),
    "another order in a BatchNorm": (lambda state: swapped(state, 1, 2), r"number 1 is no pair: .* \(32,\) are a weight and a bias"),
    "too few": (lambda state: dict(list(state.items())[:12]), r"it has 10 tensors only"),
    "another end": (
        lambda state: state | {"_more.weight": torch.ones(3)},
        r"after 20 tensors in order 3 are left \(_fc.weight, .*no classifier",
    ),
    "a name that is elsewhere": (
        lambda state: {key.replace("_layer1_norm.bias", "blocks.0.1.bias"): value for key, value in state.items()},
        r"number 2 is no pair: blocks.0.1.bias .*, which has another blocks.0.1.bias",
    ),
}


@pytest.mark.parametrize("name", OTHER_NETS)
def test_weights_of_another_net_are_refused(name: str, tmp_path: Path) -> None:
    change, words = OTHER_NETS[name]
    torch.save(change(renamed(build_backbone("conv4", "none", batch_norm="global"))), tmp_path / "w.pth")
    with pytest.raises(InputError, match=rf"lacks \d+ of the 20 tensors of model.backbone=conv4 by name.*{words}.*; give weights of this"):
        build_backbone("conv4", str(tmp_path / "w.pth"), batch_norm="global")


def test_a_file_without_order_needs_the_names(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(renamed(build_backbone("conv4", "none", batch_norm="global")), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"lacks 20 of the 20 .*has to be a \.pth: a \.safetensors file does not keep the order"):
        build_backbone("conv4", str(tmp_path / "w.safetensors"), batch_norm="global")


def test_weights_that_cannot_be_had_say_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.pth").write_bytes(b"nonsense")
    torch.save({"blocks.0.0.weight": torch.ones(1)}, tmp_path / "few.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, words in {
        "none.pth": "does not exist",
        "bad.pth": "cannot be read",
        "few.pth": "lacks 19 of",
        "list.pth": "no state dict",
    }.items():
        with pytest.raises(InputError, match=rf"model\.weights=.*{name}.*{words}"):
            build_backbone("conv4", str(tmp_path / name), batch_norm="global")
    with pytest.raises(InputError, match="no pretrained weights"):
        build_backbone("conv4", "pretrained", batch_norm="global")
    import timm
    from huggingface_hub import constants

    # Nothing in the cache, and a way into the network that leads nowhere.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert timm.is_model("mobilenetv3_small_050")
    with pytest.raises(InputError) as caught:
        build_backbone("mobilenetv3_small_050", "pretrained", batch_norm="frozen")
    assert str(caught.value).startswith(
        "model.weights=pretrained: the weights of mobilenetv3_small_050 are not on this machine and cannot be had from "
        "https://huggingface.co/timm/mobilenetv3_small_050"
    )
    assert "(" in str(caught.value) and "; set model.weights to a .pth or .safetensors file with them, or to none" in str(caught.value)


def test_a_mirror_of_the_hub_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"cannot be had from http://127\.0\.0\.1:9/timm/mobilenetv3_small_050.*Connection refused"):
        build_backbone("mobilenetv3_small_050", "pretrained", batch_norm="frozen")


def test_a_disk_that_fails_is_not_said_to_hold_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.pth"
    torch.save({}, path)

    def fail(*told: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        build_backbone("conv4", str(path), batch_norm="global")
    assert caught.value.filename == str(path)


def test_weights_in_the_cache_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm
    from huggingface_hub import constants
    from safetensors.torch import save_file

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    name = "mobilenetv3_small_050"
    network = timm.create_model(name)
    # As the hub's library lays its cache out.
    folder = tmp_path / f"models--timm--{name}.lamb_in1k"
    (folder / "snapshots" / "0").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    save_file(network.state_dict(), folder / "snapshots" / "0" / "model.safetensors")
    torch.manual_seed(3)
    built = build_backbone(name, "pretrained", batch_norm="frozen")
    assert torch.equal(built.network.conv_stem.weight, network.conv_stem.weight)  # type: ignore[union-attr,operator]


def test_dropout_is_a_function_of_the_given_uniforms() -> None:
    head = EmbeddingHead(6, 4, dropout=0.25)
    features, uniforms = torch.randn(3, 6), torch.rand(3, 6)
    expected = head.linear(features * (uniforms >= 0.25) / 0.75)
    torch.testing.assert_close(head(features, uniforms), expected)
    torch.testing.assert_close(head(features), head.linear(features))
    torch.testing.assert_close(EmbeddingHead(6, 4, 0.0)(features, uniforms).shape, torch.Size([3, 4]))


def test_inference_is_normalised_for_every_kind() -> None:
    embeddings = torch.randn(5, 8)
    whole, sliced = (parts.build("mask", kind, num_learners=4, embedding_dim=8).whole(embeddings) for kind in ("learned", "sliced"))
    torch.testing.assert_close(whole, embeddings / embeddings.norm(dim=1, keepdim=True))
    torch.testing.assert_close(sliced.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(sliced.view(5, 4, 2).norm(dim=2), torch.full((5, 4), 0.5))


# ---------------------------------------------------------------- torchvision beside a CPU-only torch


def guarded() -> bool:
    return torchvision_guard._guard in sys.meta_path


def in_a_new_process(work: Callable[..., None], *arguments: Path) -> None:
    """Run it in a process that has torch and dnc_dist, but neither torchvision nor timm."""
    process = SERVER.Process(target=work, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == 0


USER = """
import importlib, importlib.util, sys
import dnc_dist
assert importlib.util.find_spec("torchvision").origin.endswith("__init__.py")
assert not {"torch", "torchvision", "numpy"} & set(sys.modules), "import dnc_dist has to stay quick"
import timm, torchvision
from dnc_dist.base import torchvision_guard
assert torchvision_guard._guard not in sys.meta_path
timm.create_model("test_vit", num_classes=0)
assert importlib.reload(torchvision) is torchvision
"""


def test_a_user_imports_dnc_dist_and_then_timm() -> None:
    # Another folder there may import torch at the start of every interpreter.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", USER], env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _guard_the_real_one() -> None:
    assert guarded() and importlib.util.find_spec("torchvision") is not None
    assert guarded() and "torchvision" not in sys.modules, "only a question"
    child = multiprocessing.get_context("fork").Process(target=importlib.import_module, args=("torchvision",))
    child.start()
    child.join()
    assert child.exitcode == 0 and guarded()
    from torchvision import transforms

    assert not guarded()
    assert pickle.loads(pickle.dumps(transforms.CenterCrop(8))).size == (8, 8)
    assert type(transforms.__spec__.loader) is type(importlib.import_module("torchvision").__loader__)
    torchvision_guard.install()
    assert not guarded(), "too late, and not needed"


def _import_without_the_guard_first() -> None:
    torchvision_guard.remove()
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        assert "torchvision::nms does not exist" in str(error)
    torchvision_guard.install()
    importlib.import_module("timm")


def _import_one_that_works(folder: Path) -> None:
    """Its library can be loaded, so there is nothing to declare."""
    sys.path.insert(0, str(folder))
    assert importlib.import_module("torchvision").__version__ == "of the test"
    assert not guarded() and not hasattr(torch.ops.torchvision, "nms")


def _import_one_that_fails(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            importlib.import_module("torchvision")
    assert not guarded()


def _import_none() -> None:
    sys.path[:] = [entry for entry in sys.path if "site-packages" not in entry]
    with pytest.raises(ModuleNotFoundError, match="torchvision"):
        importlib.import_module("torchvision")


@pytest.mark.parametrize("work", [_guard_the_real_one, _import_without_the_guard_first, _import_none])
def test_the_guard_acts_once_and_leaves(work: Callable[[], None]) -> None:
    in_a_new_process(work)


def test_another_torchvision_is_left_alone(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = 'of the test'")
    library = importlib.util.find_spec("_multiprocessing")  # any that can be loaded
    assert library is not None and library.origin is not None
    shutil.copy(library.origin, package / "_C.so")
    in_a_new_process(_import_one_that_works, tmp_path)
    (package / "__init__.py").write_text("1 / 0")
    in_a_new_process(_import_one_that_fails, tmp_path)
