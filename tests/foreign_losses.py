"""Losses as somebody else writes them, outside of the package: what parity and configuration promise holds for these, too."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, softplus

from dnc_dist.loss.pairwise import PairMatrix, PairwiseLoss
from dnc_dist.loss.whole_batch import BatchLoss


class LogisticLoss(PairwiseLoss):
    """Every pair is classified as positive or negative by its cosine, with a learned boundary for each class."""

    class Options(PairwiseLoss.Options):
        """A logistic loss of pairs."""

        scale: float = Field(5.0, gt=0)
        """Factor on the cosines."""

    options: Options

    def __init__(self, options: Options, *, num_classes: int, embedding_dim: int) -> None:
        super().__init__(options, num_classes=num_classes, embedding_dim=embedding_dim)
        self.boundary = nn.Parameter(torch.full((num_classes,), 0.3))

    def anchor_values(self, pairs: PairMatrix) -> tuple[Tensor, Tensor]:
        """Sum over an anchor's pairs, and their number."""
        beyond = self.options.scale * (pairs.cosine - self.boundary[pairs.labels][:, None])
        terms = softplus(torch.where(pairs.positive, -beyond, beyond)).where(pairs.positive | pairs.negative, 0.0)
        return terms.sum(1), (pairs.positive | pairs.negative).sum(1)


class DroppedClassifierLoss(BatchLoss):
    """A classifier with dropout on the embeddings, which the library draws."""

    class Options(BatchLoss.Options):
        """A classifier."""

        rate: float = Field(0.3, ge=0, lt=1)
        """Of the dropout."""

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"rate": 0.5},)
    options: Options

    def __init__(self, options: Options, *, num_classes: int, embedding_dim: int) -> None:
        super().__init__(options, num_classes=num_classes, embedding_dim=embedding_dim)
        self.weights = nn.Parameter(torch.randn(num_classes, embedding_dim))

    def forward(self, z: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean cross-entropy."""
        return cross_entropy(5 * dropout(z, self.options.rate) @ self.project(self.weights, mask).T, labels)
