"""Subspace masks: which coordinates of the embedding a learner uses, over all levels of the hierarchy in one parameter."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dnc_dist.base.errors import InputError

MaskKind = Literal["learned", "fixed", "sliced"]


def _blocks(num_learners: int, embedding_dim: int) -> Tensor:
    """(K, D) zeros and ones: row a holds the a-th of K contiguous blocks; blocks 2c and 2c+1 of 2K halve block c of K."""
    coordinate = torch.arange(embedding_dim)
    starts = torch.arange(num_learners + 1) * embedding_dim // num_learners
    return ((coordinate >= starts[:-1, None]) & (coordinate < starts[1:, None])).float()


class SubspaceMasks(nn.Module):
    """The masks of K learners (TPAMI 2021, section 3.4); ``masks`` (K, D) exists whole from the start, at every level.

    Kinds: ``learned`` (ones at the start, trained), ``fixed`` (0/1, contiguous halves at every split), ``sliced``
    (D/K coordinates each, no hierarchy). Fixed and sliced masks take no gradient.

    Raises:
        InputError: the embedding has fewer coordinates than there are learners, or cannot be sliced evenly.
    """

    def __init__(self, kind: MaskKind, num_learners: int, embedding_dim: int) -> None:
        super().__init__()
        if kind == "sliced" and embedding_dim % num_learners:
            raise InputError(
                f"model.embedding_dim={embedding_dim} cannot be split among division.num_learners={num_learners} sliced learners; "
                f"use a multiple of {num_learners}"
            )
        if kind != "learned" and embedding_dim < num_learners:
            raise InputError(
                f"model.embedding_dim={embedding_dim} leaves some of division.num_learners={num_learners} {kind} learners without a "
                "coordinate; raise model.embedding_dim or lower division.num_learners"
            )
        self.kind, self.num_learners, self.embedding_dim = kind, num_learners, embedding_dim
        values = torch.ones(num_learners, embedding_dim) if kind == "learned" else _blocks(num_learners, embedding_dim)
        self.masks = nn.Parameter(values, requires_grad=kind == "learned")

    def level_masks(self, level: int) -> Tensor:
        """(k, D) masks while ``level`` = k of the K learners exist; learner a of the level stands for K/k leaf rows.

        Learned: the common value of its leaves, each of which receives the full gradient. The leaves then stay equal
        and move exactly as one parent would, and after a split the children go on with their parent's Adam moments.

        Raises:
            ValueError: level does not divide K, or is not K for sliced masks.
        """
        if level < 1 or self.num_learners % level or (self.kind == "sliced" and level != self.num_learners):
            raise ValueError(f"{self.kind} masks of {self.num_learners} learners have no level {level}")
        rows = self.masks.view(level, self.num_learners // level, self.embedding_dim)
        if self.kind != "learned":
            return rows.sum(1)
        return rows.detach()[:, 0] + (rows - rows.detach()).sum(1)

    @staticmethod
    def penalty(level_masks: Tensor) -> Tensor:
        """Mean cosine of relu(m) over ordered pairs of different learners, in fp32; 0 for one learner. (k, D) -> scalar."""
        num_learners = level_masks.shape[0]
        with torch.autocast(level_masks.device.type, enabled=False):
            positive = level_masks.float().relu() if level_masks.dtype != torch.float64 else level_masks.relu()
            if num_learners == 1:
                return positive.sum() * 0
            # The norm's gradient is 0 at a zero row, and the floor keeps its unit row 0: finite everywhere.
            unit = positive / torch.linalg.vector_norm(positive, dim=1, keepdim=True).clamp(min=1e-8)
            cosine = unit @ unit.T
            return (cosine.sum() - cosine.diagonal().sum()) / (num_learners * (num_learners - 1))

    @staticmethod
    def sparsity(level_masks: Tensor) -> Tensor:
        """Share of coordinates that the masks switch off (relu(m) = 0). (k, D) -> scalar without gradient."""
        return (level_masks.detach() <= 0).float().mean()
