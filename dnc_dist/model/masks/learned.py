"""Masks that are trained (TPAMI 2021, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from dnc_dist.model.masks.base import SubspaceMasks


class LearnedMasks(SubspaceMasks):
    """Ones at the start, trained; a penalty keeps the learners' masks apart."""

    learned = True

    def first(self) -> Tensor:
        return torch.ones(self.num_learners, self.embedding_dim)

    def level_masks(self, level: int) -> Tensor:
        """(k, D) the common value of each learner's leaves, each of which receives the full gradient.

        The leaves then stay equal and move exactly as one parent would, and after a split the children go on with their parent's
        Adam moments.

        Raises:
            ValueError: level does not divide K.
        """
        rows = self.leaves(level)
        return rows.detach()[:, 0] + (rows - rows.detach()).sum(1)
