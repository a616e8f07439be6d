"""Losses: one file each, a ``PairwiseLoss`` or a ``BatchLoss``; `parts.build("loss", ...)` makes one from its name and its options."""

from __future__ import annotations

from dnc_dist.loss.base import Loss

__all__ = ["Loss"]
