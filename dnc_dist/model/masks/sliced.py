"""Slices of the embedding, each normalised on its own (Sanakoyeu et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.model.embedding import at_least_fp32
from dnc_dist.model.masks.base import SubspaceMasks, blocks, unit


class SlicedMasks(SubspaceMasks):
    """D/K coordinates for each learner, normalised on their own: the flat method. They take no gradient."""

    class Options(parts.Options):
        def conflicts(self, cfg: Any) -> Iterator[str]:
            width, learners, mode = cfg.model.embedding_dim, cfg.division.num_learners, cfg.division.mode
            if mode != "flat":
                yield (
                    f"model.masks=sliced needs division.mode=flat (got {mode}): a slice cannot be split; "
                    "set division.mode=flat or model.masks=fixed"
                )
            if width % learners:
                yield (
                    f"model.embedding_dim={width} cannot be split among division.num_learners={learners} sliced learners; "
                    f"use a multiple of {learners}"
                )

    def first(self) -> Tensor:
        if self.embedding_dim % self.num_learners:
            raise InputError(
                f"model.embedding_dim={self.embedding_dim} cannot be split among division.num_learners={self.num_learners} sliced "
                f"learners; use a multiple of {self.num_learners}"
            )
        return blocks(self.num_learners, self.embedding_dim)

    def level_masks(self, level: int) -> Tensor:
        if level != self.num_learners:
            raise ValueError(f"{self.num_learners} sliced learners have no level {level}")
        return self.leaves(level).sum(1)

    def whole(self, embeddings: Tensor) -> Tensor:
        """(B, D) -> (B, D) the unit slices side by side / sqrt(K)."""
        slices = unit(at_least_fp32(embeddings).unflatten(1, (self.num_learners, -1)))
        return slices.flatten(1) / self.num_learners**0.5
