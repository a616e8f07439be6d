"""Subspace masks: one file for each kind."""

from __future__ import annotations

from dnc_dist.model.masks.base import SubspaceMasks

__all__ = ["SubspaceMasks"]
