"""Random crops and flips."""

from __future__ import annotations

from PIL import Image

from dnc_dist.data.augmentations.base import Augmentation
from dnc_dist.data.augmentations.geometry import crop_and_flip


class Standard(Augmentation):
    """Random resized crop (area 0.2 to 1, aspect ratio 3/4 to 4/3) and flip."""

    def geometry(self, image: Image.Image, size: int, crop: float, u: list[float]) -> Image.Image:
        return crop_and_flip(image, size, u)
