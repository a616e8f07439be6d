"""What every augmentation is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from PIL import Image
from torch import Tensor

from dnc_dist.base import parts


class Augmentation(ABC):
    """Base of augmentations: a function of an image and of uniform numbers that are drawn by its slot in the batch, never of a state.

    So pixels are the same on any number of ranks.
    """

    class Options(parts.Options):
        """Default, range and meaning of every option."""

    moves: ClassVar[bool] = True
    """Whether ``geometry`` needs uniform numbers."""
    recolours: ClassVar[bool] = False
    """Whether there is a pixel part, which needs uniform numbers, too."""

    def __init__(self, options: parts.Options) -> None:
        self.options = options

    @abstractmethod
    def geometry(self, image: Image.Image, size: int, crop: float, u: list[float]) -> Image.Image:
        """One RGB image at ``size`` x ``size``, in a loader's worker.

        Args:
            image: of any size.
            size: side of the result, pixels.
            crop: share of the shorter side that the evaluation shows.
            u: CROP_UNIFORMS numbers in [0, 1).
        """

    def pixels(self, pixels: Tensor, images: Tensor, u: Tensor) -> Tensor:
        """The pixels of a batch on its device, changed; row i depends on image i and on its own numbers alone.

        Args:
            pixels: (B, 3, H, W) float32 in [0, 1].
            images: (B, 3, H, W) uint8, the same.
            u: (B, PIXEL_UNIFORMS) in [0, 1).
        """
        return pixels
