"""Small shifts and scales."""

from __future__ import annotations

from PIL import Image

from dnc_dist.data.augmentations.base import Augmentation
from dnc_dist.data.augmentations.geometry import Box, evaluation_box, resize


class Light(Augmentation):
    """Small shifts and scales without a flip, for characters and other things that have a left and a right."""

    def geometry(self, image: Image.Image, size: int, crop: float, u: list[float]) -> Image.Image:
        return resize(image, _box(*image.size, crop, u), size)


def _box(width: int, height: int, crop: float, u: list[float]) -> Box:
    """The evaluation square, 10 % larger or smaller and shifted by up to 8 % of its side; it may reach beyond the image."""
    left, top, right, _ = evaluation_box(width, height, crop)
    side = right - left
    new = side * (0.9 + 0.2 * u[0])
    x = left + (side - new) / 2 + side * 0.16 * (u[20] - 0.5)
    y = top + (side - new) / 2 + side * 0.16 * (u[21] - 0.5)
    return x, y, x + new, y + new
