"""Image geometry in the loader's workers, pixel augmentation on the device; both driven by given uniform numbers, never by a state.

Row i of a result depends on its own image and its own uniforms alone, so that pixels are the same on any number of ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dnc_dist.base import parts
from dnc_dist.data.augmentations import Augmentation
from dnc_dist.data.augmentations.geometry import CROP_UNIFORMS, evaluation_box, resize
from dnc_dist.data.augmentations.pixels import PIXEL_UNIFORMS

__all__ = ["CROP_UNIFORMS", "Augment", "Geometry", "evaluation_box", "to_tensor"]


class Geometry:
    """Decoded image to (3, size, size) uint8, with the geometric part of an augmentation, or (None) as the evaluation shows it."""

    def __init__(self, augmentation: Augmentation | parts.Named | str | None, image_size: int, crop: float = 1.0) -> None:
        self.augmentation = _built(augmentation)
        self.image_size, self.crop = image_size, crop

    @property
    def uses_uniforms(self) -> bool:
        """Whether training needs uniform numbers."""
        return self.augmentation is not None and self.augmentation.moves

    def __call__(self, image: Image.Image, uniforms: Tensor | None = None) -> Tensor:
        """Transform one RGB image with (CROP_UNIFORMS,) numbers; an augmentation that moves nothing needs none."""
        if self.augmentation is None or (uniforms is None and self.augmentation.moves):
            return to_tensor(resize(image, evaluation_box(*image.size, self.crop), self.image_size))
        return to_tensor(self.augmentation.geometry(image, self.image_size, self.crop, [] if uniforms is None else uniforms.tolist()))


def to_tensor(image: Image.Image) -> Tensor:
    """(3, height, width) uint8, in memory (height, width, 3): the layout that convolutions want in the end, and no pixel is moved."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Augment(nn.Module):
    """Pixels on the device: (B, 3, H, W) uint8 to normalised float32, with the pixel part of the augmentation while training."""

    num_uniforms = PIXEL_UNIFORMS

    def __init__(
        self,
        augmentation: Augmentation | parts.Named | str | None,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.25, 0.25, 0.25),
    ) -> None:
        super().__init__()
        self.augmentation = _built(augmentation)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @property
    def uses_uniforms(self) -> bool:
        """Whether training needs uniform numbers."""
        return self.augmentation is not None and self.augmentation.recolours

    def forward(self, images: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) float32.

        Args:
            images: (B, 3, H, W) uint8.
            uniforms: (B, num_uniforms) in [0, 1); None: no augmentation (evaluation).
        """
        pixels = images.float() / 255
        if uniforms is not None and self.augmentation is not None and self.augmentation.recolours:
            pixels = self.augmentation.pixels(pixels, images, uniforms.to(pixels.device))
        return (pixels - self.mean) / self.std


def _built(augmentation: Augmentation | parts.Named | str | None) -> Augmentation | None:
    if augmentation is None or isinstance(augmentation, Augmentation):
        return augmentation
    built: Augmentation = parts.build("augmentation", augmentation)
    return built
