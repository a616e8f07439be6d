"""Masks of zeros and ones that halve at every split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from dnc_dist.base import parts
from dnc_dist.model.masks.base import SubspaceMasks, blocks


class FixedMasks(SubspaceMasks):
    """Zeros and ones, contiguous halves at every split; they take no gradient."""

    class Options(parts.Options):
        def conflicts(self, cfg: Any) -> Iterator[str]:
            width, learners = cfg.model.embedding_dim, cfg.division.num_learners
            if width % learners:
                yield (
                    f"model.embedding_dim={width} cannot be halved down to division.num_learners={learners} fixed masks; "
                    f"use a multiple of {learners}"
                )

    def first(self) -> Tensor:
        return blocks(self.num_learners, self.embedding_dim)

    def level_masks(self, level: int) -> Tensor:
        return self.leaves(level).sum(1)
