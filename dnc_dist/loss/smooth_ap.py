"""Smooth-AP (Brown et al., Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval, ECCV 2020)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from dnc_dist.loss.pairwise import PairMatrix, PairwiseLoss


class SmoothAPLoss(PairwiseLoss):
    """1 - AP of each anchor as a query, with ranks made smooth: a sigmoid of the difference of cosines counts who comes before (eq. 6).

    AP = 1/P Σ_i (1 + Σ_j G(s_j - s_i)) / (1 + Σ_k G(s_k - s_i)), i and j over positives and k over positives and negatives, none
    equal to i; G(x) = 1 / (1 + exp(-x/τ)). As in the authors' code the query is among its own positives. Averaged over the anchors
    that have other ones.
    """

    class Options(PairwiseLoss.Options):
        """Smooth-AP, a ranking loss (Brown et al., ECCV 2020)."""

        temperature: float = Field(0.01, gt=0)
        """τ of the sigmoid that stands for a step; smaller is closer to the true average precision."""

    options: Options

    def anchor_values(self, pairs: PairMatrix) -> tuple[Tensor, Tensor]:
        """1 - AP of an anchor, and 1; 0 and 0 without positives. See ``PairwiseLoss.anchor_values``."""
        positive, exists = pairs.positives()
        positive = torch.cat([torch.ones_like(pairs.cosine[:, :1]), positive], 1)  # the query itself
        exists = torch.cat([torch.ones_like(pairs.positive[:, :1]), exists], 1)
        others = exists[:, None, :] & ~torch.eye(exists.shape[1], dtype=torch.bool, device=exists.device)
        before = self._ahead(positive, positive, others)
        rank = before + self._ahead(positive, pairs.cosine, pairs.negative[:, None, :])
        precision = ((1 + before) / (1 + rank)).masked_fill(~exists, 0.0).sum(1) / exists.sum(1)
        counted = pairs.positive.any(1)
        return torch.where(counted, 1 - precision, 0.0), counted.long()

    def _ahead(self, positive: Tensor, others: Tensor, counted: Tensor) -> Tensor:
        """How many of the others (b, n) come before each positive (b, P), smoothly: (b, P)."""
        ahead = torch.sigmoid((others[:, None, :] - positive[:, :, None]) / self.options.temperature)
        return ahead.masked_fill(~counted, 0.0).sum(2)
