"""From images to embeddings: what of the training is left afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnc_dist.base import parts
from dnc_dist.config import Model, RunConfig
from dnc_dist.data.transforms import Augment
from dnc_dist.model.backbone import build_backbone
from dnc_dist.model.batch_norm import BatchNormKind
from dnc_dist.model.embedding import EmbeddingHead, at_least_fp32
from dnc_dist.model.masks import SubspaceMasks
from dnc_dist.processes import distributed

M = TypeVar("M", bound=nn.Module)
_MEMBERS = ("backbone", "head", "masks")


def of_network(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a training that belong to its network: all but the loss's."""
    return {name: value for name, value in weights.items() if name.partition(".")[0] in _MEMBERS}


class EmbeddingNetwork(nn.Module):
    """Backbone, embedding layer and masks. For evaluation mode; the training adds the rest.

    Args:
        backbone: images (B, 3, H, W) to features (B, F).
        head: features to raw embeddings (B, D).
        masks: of the subspaces.
        augment: uint8 images to normalised pixels.
        autocast: type that the backbone computes in; None: fp32.
    """

    def __init__(
        self, backbone: nn.Module, head: EmbeddingHead, masks: SubspaceMasks, augment: Augment, *, autocast: torch.dtype | None
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.masks, self.augment = backbone, head, masks, augment
        self.autocast = autocast

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, F) L2-normalised backbone features in fp32, as k-means sees them. In evaluation mode."""
        return F.normalize(self._through(self.backbone, self._pixels(images)).float(), dim=1)

    def embeddings(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D) unit embeddings as retrieval compares them: the whole embedding. In evaluation mode."""
        return self.masks.whole(self._raw(images))

    def subspace(self, images: Tensor, learner: int, level: int) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D) unit embeddings in the subspace of one of ``level`` learners. In evaluation mode."""
        mask = self.masks.level_masks(level)[learner].relu()
        return F.normalize(self._raw(images) * mask, dim=1)

    def _raw(self, images: Tensor) -> Tensor:
        raw: Tensor = self.head(self._through(self.backbone, self._pixels(images)))
        return raw

    def _through(self, backbone: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, F) features in fp32 at least, whatever type the backbone computes in.

        So the embedding layer computes in fp32: it costs next to nothing, and what it gives is not rounded to the 8 bits of bf16, in
        which embeddings that are near each other are equal.
        """
        with torch.autocast(pixels.device.type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            features = backbone(pixels)
        return at_least_fp32(features)

    def _pixels(self, images: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """Augmented, normalised pixels in the memory layout that convolutions are fastest in (1.6 times on the CPU)."""
        return self.augment(images, uniforms).contiguous(memory_format=torch.channels_last)


def on_device(module: M, device: torch.device) -> M:
    """The module, moved there. On a GPU the weights of its convolutions get the memory layout of the images.

    Otherwise a GPU rearranges them at every call, and their gradients, too. The values, and so all that is saved, stay what they are.
    """
    if device.type == "cuda":
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module.to(device)


def batch_norm_kind(model: Model) -> BatchNormKind:
    """What ``model.batch_norm`` means: statistics that nobody measured are not worth freezing."""
    if model.batch_norm != "auto":
        return model.batch_norm
    return "global" if model.weights == "none" else "frozen"


def autocast_dtype(cfg: RunConfig, device: torch.device | None = None) -> torch.dtype | None:
    """Type of the backbone's autocast on a device (None: this rank's); None: everything in fp32."""
    kind = (distributed.device() if device is None else device).type
    bf16 = cfg.engine.precision == "bf16" or (cfg.engine.precision == "auto" and kind == "cuda")
    return torch.bfloat16 if bf16 else None


def build_network(cfg: RunConfig, *, initial_weights: bool, device: torch.device | None = None) -> EmbeddingNetwork:
    """The untrained network, on the CPU.

    Args:
        cfg: the configuration.
        initial_weights: False where others follow: then ``model.weights`` is not needed.
        device: that it is going to compute on, which decides its precision; None: this rank's.

    Raises:
        InputError: a value of the configuration does not fit the network, or its weights cannot be had.
    """
    model = cfg.model
    backbone = build_backbone(
        model.backbone, model.weights if initial_weights else "none", batch_norm=batch_norm_kind(model), pooling=model.pooling
    )
    return EmbeddingNetwork(
        backbone,
        EmbeddingHead(backbone.feature_dim, model.embedding_dim, model.dropout),
        parts.build("mask", model.masks, num_learners=cfg.division.num_learners, embedding_dim=model.embedding_dim),
        Augment(cfg.data.augment, cfg.data.mean, cfg.data.std),
        autocast=autocast_dtype(cfg, device),
    )
