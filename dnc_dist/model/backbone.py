"""Backbones: images to features. A small built-in convolutional net, or any timm model by name."""

from __future__ import annotations

import difflib
import itertools
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import read_tensors
from dnc_dist.model.batch_norm import BatchNormKind, replace_batch_norm
from dnc_dist.model.pretrained import hub_address, load_pretrained

Pooling = Literal["avg", "max", "avg+max"]


def _pool(maps: Tensor, pooling: Pooling) -> Tensor:
    """(B, F, P) over P positions -> (B, F)."""
    if pooling == "avg":
        return maps.mean(2)
    return maps.amax(2) if pooling == "max" else maps.mean(2) + maps.amax(2)


class Conv4(nn.Module):
    """Four blocks of conv3x3-BatchNorm-ReLU-maxpool2 with 32, 64, 128 and 256 channels, for runs on a CPU.

    Images of 16 pixels or more: (B, 3, H, W) -> (B, 256).
    """

    feature_dim = 256

    def __init__(self, pooling: Pooling = "avg") -> None:
        super().__init__()
        self.pooling: Pooling = pooling
        widths = (3, 32, 64, 128, self.feature_dim)
        self.blocks = nn.Sequential(
            *[
                nn.Sequential(
                    nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True), nn.MaxPool2d(2)
                )
                for before, after in itertools.pairwise(widths)
            ]
        )

    def forward(self, images: Tensor) -> Tensor:
        return _pool(self.blocks(images).flatten(2), self.pooling)


class TimmBackbone(nn.Module):
    """A timm model without its classifier, with our pooling over positions (patch tokens, for a transformer).

    (B, 3, H, W) -> (B, F)
    """

    def __init__(self, network: nn.Module, feature_dim: int, pooling: Pooling) -> None:
        super().__init__()
        self.network, self.feature_dim = network, feature_dim
        self.pooling: Pooling = pooling
        self.num_prefix_tokens = int(getattr(network, "num_prefix_tokens", 0))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.network(images)
        if maps.dim() == 2:  # a network that pools whatever it is told
            return maps
        if maps.dim() == 3:
            return _pool(maps[:, self.num_prefix_tokens :].transpose(1, 2), self.pooling)
        channels_first = maps if maps.shape[1] == self.feature_dim else maps.permute(0, 3, 1, 2)
        return _pool(channels_first.flatten(2), self.pooling)


def _build_timm(name: str, weights: str, pooling: Pooling) -> TimmBackbone:
    import timm  # 2.4 s: only for those who ask for it

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, ["conv4", *timm.list_models()], n=4)
        hint = f"did you mean {' or '.join(close)}?" if close else "`timm.list_models()` lists them"
        raise InputError(f"model.backbone={name} is neither conv4 nor a model of timm {timm.__version__}; {hint}")
    source = timm.get_pretrained_cfg(name)
    hub, address = (source.hf_hub_id, source.url) if source is not None else (None, None)
    address = hub_address(hub) if hub else str(address) if address else None
    create = partial(timm.create_model, name, pretrained=weights == "pretrained", num_classes=0, global_pool="")
    network: Any = load_pretrained(name, create, address) if weights == "pretrained" else create()
    feature_dim = getattr(network, "head_hidden_size", None) or network.num_features
    return TimmBackbone(network, feature_dim, pooling)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"model.weights={path} does not exist; give none, pretrained, or the path of a .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = read_tensors(path)
    except Exception as error:  # foreign bytes make the reader of .safetensors raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"model.weights={path} cannot be read as weights ({reason}); give a .pth with a state dict or a .safetensors file"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"model.weights={path} holds no state dict (names to tensors); save `model.state_dict()`")
    return state


def _load_weights(network: nn.Module, path: Path, name: str) -> None:
    """Load a file into a network; of the file's entries only those of a classifier may be left over."""
    state = {key.removeprefix("module."): value for key, value in _read_weights(path).items()}
    own = network.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        raise InputError(
            f"model.weights={path} lacks {len(missing)} of the {len(own)} tensors of model.backbone={name}, first {missing[0]}; "
            "give weights of this backbone or change model.backbone"
        )
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    if wrong:
        key = wrong[0]
        raise InputError(
            f"model.weights={path}: {key} has shape {tuple(state[key].shape)}, model.backbone={name} needs {tuple(own[key].shape)}; "
            "give weights of this backbone or change model.backbone"
        )
    network.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)


def build_backbone(name: str, weights: str, *, batch_norm: BatchNormKind, pooling: Pooling = "avg") -> Conv4 | TimmBackbone:
    """A backbone with ``feature_dim`` = F and ``forward(images (B, 3, H, W)) -> (B, F)``.

    Args:
        name: "conv4", or any name that timm knows.
        weights: "none" (random), "pretrained" (downloaded by timm), or the path of a .pth or .safetensors file.
        batch_norm: see ``batch_norm.py``.
        pooling: over positions; "avg+max" is the sum of both.

    Raises:
        InputError: unknown name, a download that fails, a file that does not fit.
    """
    backbone: Conv4 | TimmBackbone
    if name == "conv4":
        if weights == "pretrained":
            raise InputError(
                "model.weights=pretrained: the built-in conv4 has no pretrained weights; set model.weights to none or to a file"
            )
        backbone = Conv4(pooling)
    else:
        backbone = _build_timm(name, weights, pooling)
    if weights not in ("none", "pretrained"):
        _load_weights(backbone.network if isinstance(backbone, TimmBackbone) else backbone, Path(weights), name)
    replace_batch_norm(backbone, batch_norm)
    return backbone
