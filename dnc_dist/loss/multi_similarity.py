"""Multi-similarity loss (Wang et al., Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning, CVPR 2019)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dnc_dist.loss.pairwise import PairMatrix, PairwiseLoss, log_one_plus_exp, logsumexp


class MultiSimilarityLoss(PairwiseLoss):
    """1/α log(1 + Σ_p exp(-α (s_ap - λ))) + 1/β log(1 + Σ_n exp(β (s_an - λ))) with cosines s (equation 15), averaged over all rows.

    Mining keeps negatives that are nearer than the farthest positive, and positives that are farther than the nearest negative, both
    within ε (equations 11 and 12).
    """

    class Options(PairwiseLoss.Options):
        """Multi-similarity loss with its mining of pairs (Wang et al., CVPR 2019)."""

        alpha: float = Field(2.0, gt=0)
        """Weight of positives, in the exponent."""
        beta: float = Field(50.0, gt=0)
        """Weight of negatives, in the exponent."""
        boundary: float = Field(0.5, ge=-1, le=1)
        """The cosine λ between positives and negatives."""
        epsilon: float | None = Field(0.1, ge=0)
        """Tolerance of the mining, as a cosine; null takes all pairs."""

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"epsilon": None})
    options: Options

    def anchor_values(self, pairs: PairMatrix) -> tuple[Tensor, Tensor]:
        """An anchor's value, and 1. See ``PairwiseLoss.anchor_values``."""
        options, cosine, positive, negative = self.options, pairs.cosine, pairs.positive, pairs.negative
        if options.epsilon is not None:
            farthest = cosine.masked_fill(~positive, torch.inf).amin(1, keepdim=True)
            nearest = cosine.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
            positive = positive & (cosine - options.epsilon < nearest)
            negative = negative & (cosine + options.epsilon > farthest)
        attraction = log_one_plus_exp(logsumexp(-options.alpha * (cosine - options.boundary), positive)) / options.alpha
        repulsion = log_one_plus_exp(logsumexp(options.beta * (cosine - options.boundary), negative)) / options.beta
        return attraction + repulsion, torch.ones_like(pairs.labels)
