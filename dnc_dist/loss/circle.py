"""Circle loss (Sun et al., Circle Loss: A Unified Perspective of Pair Similarity Optimization, CVPR 2020)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from dnc_dist.loss.pairwise import PairMatrix, PairwiseLoss, log_one_plus_exp, logsumexp


class CircleLoss(PairwiseLoss):
    """log(1 + Σ_n exp(γ α_n (s_an - m)) Σ_p exp(-γ α_p (s_ap - (1 - m)))) with cosines s (equations 6 and 8).

    The weights α_p = relu(1 + m - s_ap) and α_n = relu(s_an + m) take no gradient. Averaged over the anchors that have positives and
    negatives.
    """

    class Options(PairwiseLoss.Options):
        """Circle loss (Sun et al., CVPR 2020)."""

        margin: float = Field(0.4, ge=0, lt=1)
        """Relaxation m of the decision boundary."""
        scale: float = Field(80.0, gt=0)
        """Factor γ on the weighted cosines."""

    options: Options

    def anchor_values(self, pairs: PairMatrix) -> tuple[Tensor, Tensor]:
        """An anchor's value, and 1; 0 and 0 without positives or without negatives. See ``PairwiseLoss.anchor_values``."""
        cosine, margin, scale = pairs.cosine, self.options.margin, self.options.scale
        fixed = cosine.detach()
        attraction = logsumexp(-scale * torch.relu(1 + margin - fixed) * (cosine - (1 - margin)), pairs.positive)
        repulsion = logsumexp(scale * torch.relu(fixed + margin) * (cosine - margin), pairs.negative)
        counted = pairs.positive.any(1) & pairs.negative.any(1)
        return torch.where(counted, log_one_plus_exp(attraction + repulsion), 0.0), counted.long()
