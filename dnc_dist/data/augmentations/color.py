"""Random crops, flips and colours."""

from __future__ import annotations

from torch import Tensor

from dnc_dist.data.augmentations.pixels import jitter
from dnc_dist.data.augmentations.standard import Standard


class Color(Standard):
    """As standard, with brightness, contrast, saturation 0.4 and hue 0.1 with probability 0.8, grey with 0.2."""

    recolours = True

    def pixels(self, pixels: Tensor, images: Tensor, u: Tensor) -> Tensor:
        return jitter(pixels, images, u, strong=True)
