"""Supervised contrastive loss (Khosla et al., NeurIPS 2020); with two rows of each class it is NT-Xent (Chen et al., ICML 2020)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from dnc_dist.loss.pairwise import PairMatrix, PairwiseLoss, logsumexp


class SupConLoss(PairwiseLoss):
    """-1/P Σ_p log(exp(s_ap/τ) / Σ_j exp(s_aj/τ)), j over positives and negatives (equation 2 of Khosla et al., L_out).

    Averaged over the anchors that have positives and negatives.
    """

    class Options(PairwiseLoss.Options):
        """Supervised contrastive loss (Khosla et al., NeurIPS 2020); NT-Xent where a class has two rows in the batch."""

        temperature: float = Field(0.1, gt=0)
        """τ, by which cosines are divided."""

    options: Options

    def anchor_values(self, pairs: PairMatrix) -> tuple[Tensor, Tensor]:
        """An anchor's value, and 1; 0 and 0 without positives or without negatives. See ``PairwiseLoss.anchor_values``."""
        scaled = pairs.cosine / self.options.temperature
        counted = pairs.positive.any(1) & pairs.negative.any(1)
        mean = scaled.masked_fill(~pairs.positive, 0.0).sum(1) / pairs.positive.sum(1).clamp_min(1)
        value = logsumexp(scaled, pairs.positive | pairs.negative) - mean
        return torch.where(counted, value, 0.0), counted.long()
