"""Backbones: images to features. One file for each: the built-in net, and all of timm's by their names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dnc_dist.base import parts
from dnc_dist.model.backbone.base import Backbone, Pooling
from dnc_dist.model.backbone.weights import load_weights
from dnc_dist.model.batch_norm import BatchNormKind, replace_batch_norm

__all__ = ["Backbone", "Pooling", "build_backbone"]


def build_backbone(
    chosen: parts.Named | Mapping[str, Any] | str, weights: str, *, batch_norm: BatchNormKind, pooling: Pooling = "avg"
) -> Backbone:
    """A backbone with ``feature_dim`` = F and ``forward(images (B, 3, H, W)) -> (B, F)``.

    Args:
        chosen: its name and options.
        weights: "none" (random), "pretrained" (published ones), or the path of a .pth or .safetensors file.
        batch_norm: see ``batch_norm.py``.
        pooling: over positions; "avg+max" is the sum of both.

    Raises:
        InputError: unknown name, a download that fails, a file that does not fit.
    """
    backbone: Backbone = parts.build("backbone", chosen, pretrained=weights == "pretrained", pooling=pooling)
    if weights not in ("none", "pretrained"):
        load_weights(backbone.network_of_weights(), Path(weights), parts.name_of_chosen(chosen))
    replace_batch_norm(backbone, batch_norm)
    return backbone
