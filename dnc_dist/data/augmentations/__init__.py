"""Training augmentations: one file for each. Each changes the geometry of an image, and some the pixels of a batch, too."""

from __future__ import annotations

from dnc_dist.data.augmentations.base import Augmentation

__all__ = ["Augmentation"]
