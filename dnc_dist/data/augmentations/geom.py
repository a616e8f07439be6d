"""Random rotations, crops, flips, holes and blur."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from dnc_dist.data.augmentations.base import Augmentation
from dnc_dist.data.augmentations.geometry import crop_and_flip, rotate
from dnc_dist.data.augmentations.pixels import blur, cut_holes


class Geom(Augmentation):
    """Rotation by up to 45 degrees, then as standard; up to five holes of 40/224 and a box blur, each with probability 1/2."""

    recolours = True

    def geometry(self, image: Image.Image, size: int, crop: float, u: list[float]) -> Image.Image:
        return crop_and_flip(rotate(image, u), size, u)

    def pixels(self, pixels: Tensor, images: Tensor, u: Tensor) -> Tensor:
        return blur(cut_holes(pixels, u), u)
