"""Subspace masks: which coordinates of the embedding a learner uses, over all levels of the hierarchy in one parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.model.embedding import at_least_fp32


class SubspaceMasks(nn.Module, ABC):
    """Base of the masks of K learners (TPAMI 2021, section 3.4); ``masks`` (K, D) exists whole from the start, at every level.

    Args:
        options: of the kind of mask.
        num_learners: K.
        embedding_dim: D.
    """

    class Options(parts.Options):
        """Default, range and meaning of every option."""

    learned: ClassVar[bool] = False
    """Whether the masks are trained, with the penalty on their cosines."""

    def __init__(self, options: parts.Options, *, num_learners: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_learners, self.embedding_dim = num_learners, embedding_dim
        self.masks = nn.Parameter(self.first(), requires_grad=self.learned)

    @abstractmethod
    def first(self) -> Tensor:
        """(K, D) the masks at the start.

        Raises:
            InputError: the embedding cannot be divided among so many learners.
        """

    @abstractmethod
    def level_masks(self, level: int) -> Tensor:
        """(k, D) masks while ``level`` = k of the K learners exist; learner a of the level stands for K/k leaf rows.

        Raises:
            ValueError: there is no such level.
        """

    def whole(self, embeddings: Tensor) -> Tensor:
        """(B, D) raw embeddings -> (B, D) as retrieval compares them: the whole embedding, with rows of norm 1, in fp32 at least."""
        return unit(at_least_fp32(embeddings))

    def leaves(self, level: int) -> Tensor:
        """(k, K/k, D) the rows of ``masks`` below each of the ``level`` = k learners.

        Raises:
            ValueError: level does not divide K.
        """
        if level < 1 or self.num_learners % level:
            raise ValueError(f"masks of {self.num_learners} learners have no level {level}")
        return self.masks.view(level, self.num_learners // level, self.embedding_dim)

    @staticmethod
    def penalty(level_masks: Tensor) -> Tensor:
        """Mean cosine of relu(m) over ordered pairs of different learners, in fp32; 0 for one learner. (k, D) -> scalar."""
        num_learners = level_masks.shape[0]
        with torch.autocast(level_masks.device.type, enabled=False):
            positive = level_masks.float().relu() if level_masks.dtype != torch.float64 else level_masks.relu()
            if num_learners == 1:
                return positive.sum() * 0
            # The norm's gradient is 0 at a zero row, and the floor keeps its unit row 0: finite everywhere.
            rows = positive / torch.linalg.vector_norm(positive, dim=1, keepdim=True).clamp(min=1e-8)
            cosine = rows @ rows.T
            return (cosine.sum() - cosine.diagonal().sum()) / (num_learners * (num_learners - 1))

    @staticmethod
    def sparsity(level_masks: Tensor) -> Tensor:
        """Share of coordinates that the masks switch off (relu(m) = 0). (k, D) -> scalar without gradient."""
        return (level_masks.detach() <= 0).float().mean()


def unit(x: Tensor) -> Tensor:
    """(..., D) with last dimensions of norm 1; one of norm 0 stays 0 with gradient 0, as in ``dnc_kernels.project``.

    ``torch.nn.functional.normalize`` gives it a gradient of 1e12.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)


def blocks(num_learners: int, embedding_dim: int) -> Tensor:
    """(K, D) zeros and ones: row a holds the a-th of K contiguous blocks; blocks 2c and 2c+1 of 2K halve block c of K.

    Raises:
        InputError: the embedding has fewer coordinates than there are learners.
    """
    if embedding_dim < num_learners:
        raise InputError(
            f"model.embedding_dim={embedding_dim} leaves some of division.num_learners={num_learners} learners without a "
            "coordinate; raise model.embedding_dim or lower division.num_learners"
        )
    coordinate = torch.arange(embedding_dim)
    starts = torch.arange(num_learners + 1) * embedding_dim // num_learners
    return ((coordinate >= starts[:-1, None]) & (coordinate < starts[1:, None])).float()
