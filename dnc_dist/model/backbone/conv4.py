"""A small convolutional net, for runs on a CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.model.backbone.base import Backbone, Pooling, pool


class Conv4(Backbone):
    """Four blocks of conv3x3-BatchNorm-ReLU-maxpool2 with 32, 64, 128 and 256 channels, for runs on a CPU.

    Images of 16 pixels or more: (B, 3, H, W) -> (B, 256).
    """

    class Options(parts.Options):
        def conflicts(self, cfg: Any) -> Iterator[str]:
            if (size := cfg.data.image_size) < 16:
                yield f"data.image_size={size} is too small for model.backbone=conv4, which halves it four times; use at least 16"

    feature_dim = 256

    def __init__(self, options: Options, *, pretrained: bool, pooling: Pooling = "avg") -> None:
        super().__init__(options, pretrained=pretrained, pooling=pooling)
        if pretrained:
            raise InputError(
                "model.weights=pretrained: the built-in conv4 has no pretrained weights; set model.weights to none or to a file"
            )
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
        return pool(self.blocks(images).flatten(2), self.pooling)
