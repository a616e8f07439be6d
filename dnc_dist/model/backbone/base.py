"""What every backbone is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor, nn

from dnc_dist.base import parts

Pooling = Literal["avg", "max", "avg+max"]


class Backbone(nn.Module, ABC):
    """Base of backbones: ``forward`` makes features (B, F) of images (B, 3, H, W).

    Args:
        options: of the backbone.
        pretrained: whether it begins with published weights; else with random ones.
        pooling: over positions; "avg+max" is the sum of both.

    Raises:
        InputError: there are no such weights.
    """

    class Options(parts.Options):
        """Default, range and meaning of every option."""

    feature_dim: int
    """F."""

    def __init__(self, options: parts.Options, *, pretrained: bool, pooling: Pooling = "avg") -> None:
        super().__init__()
        self.pretrained = pretrained
        self.pooling: Pooling = pooling

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images -> (B, F) features."""

    def network_of_weights(self) -> nn.Module:
        """The module that a file of ``model.weights`` is loaded into."""
        return self


def pool(maps: Tensor, pooling: Pooling) -> Tensor:
    """(B, F, P) over P positions -> (B, F)."""
    if pooling == "avg":
        return maps.mean(2)
    return maps.amax(2) if pooling == "max" else maps.mean(2) + maps.amax(2)
