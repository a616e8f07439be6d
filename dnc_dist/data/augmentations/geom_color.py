"""Random crops, flips, rotations, brightness, holes and blur."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from dnc_dist.data.augmentations.base import Augmentation
from dnc_dist.data.augmentations.geometry import crop_and_flip, rotate
from dnc_dist.data.augmentations.pixels import blur, cut_holes, jitter


class GeomColor(Augmentation):
    """As standard, then rotation by up to 45 degrees; brightness and contrast 0.2 with probability 1/2, holes and blur as geom."""

    recolours = True

    def geometry(self, image: Image.Image, size: int, crop: float, u: list[float]) -> Image.Image:
        return rotate(crop_and_flip(image, size, u), u)

    def pixels(self, pixels: Tensor, images: Tensor, u: Tensor) -> Tensor:
        return blur(cut_holes(jitter(pixels, images, u, strong=False), u), u)
