"""Backbones by name, their weights, the embedding layer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from dnc_dist.errors import InputError
from dnc_dist.model import backbone as backbone_module
from dnc_dist.model.backbone import build_backbone
from dnc_dist.model.batch_norm import FrozenBatchNorm2d, GlobalBatchNorm2d
from dnc_dist.model.embedding import EmbeddingHead, inference


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
    images = torch.randn(3, 3, 64, 64)
    maps = plain.train(kind == "global")(images)
    torch.testing.assert_close(network.train()(images), maps.mean((2, 3)), rtol=1e-4, atol=1e-5)


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
    backbone_module._declare_torchvision_operators()
    import timm

    def offline(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("cannot find the requested files\nand more")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"resnet50 cannot be had \(cannot find the requested files\); set model\.weights to a \.pth"):
        build_backbone("resnet50", "pretrained", batch_norm="frozen")


def test_dropout_is_a_function_of_the_given_uniforms() -> None:
    head = EmbeddingHead(6, 4, dropout=0.25)
    features, uniforms = torch.randn(3, 6), torch.rand(3, 6)
    expected = head.linear(features * (uniforms >= 0.25) / 0.75)
    torch.testing.assert_close(head(features, uniforms), expected)
    torch.testing.assert_close(head(features), head.linear(features))
    torch.testing.assert_close(EmbeddingHead(6, 4, 0.0)(features, uniforms).shape, torch.Size([3, 4]))


def test_inference_is_normalised_for_every_kind() -> None:
    embeddings = torch.randn(5, 8)
    whole, sliced = inference(embeddings, "learned", 4), inference(embeddings, "sliced", 4)
    torch.testing.assert_close(whole, embeddings / embeddings.norm(dim=1, keepdim=True))
    torch.testing.assert_close(sliced.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(sliced.view(5, 4, 2).norm(dim=2), torch.full((5, 4), 0.5))
