"""No augmentation."""

from __future__ import annotations

from PIL import Image

from dnc_dist.data.augmentations.base import Augmentation
from dnc_dist.data.augmentations.geometry import evaluation_box, resize


class NoAugmentation(Augmentation):
    """The centre crop of the evaluation, always the same."""

    moves = False

    def geometry(self, image: Image.Image, size: int, crop: float, u: list[float]) -> Image.Image:
        return resize(image, evaluation_box(*image.size, crop), size)
