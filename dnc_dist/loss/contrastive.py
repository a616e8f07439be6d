"""Contrastive loss (Hadsell et al., CVPR 2006) on cosines, as Wang et al. use it (Cross-Batch Memory, CVPR 2020, section 3.1)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from dnc_dist.loss.pairwise import PairMatrix, PairwiseLoss


class ContrastiveLoss(PairwiseLoss):
    """Σ_p (1 - s_ap) + Σ_n relu(s_an - margin) with cosines s, averaged over the anchors that are in a pair.

    For unit vectors 1 - s is half the squared distance, the term of Hadsell et al. for positives.
    """

    class Options(PairwiseLoss.Options):
        """Contrastive loss on cosines (Hadsell et al., CVPR 2006; Wang et al., CVPR 2020)."""

        margin: float = Field(0.5, ge=-1, lt=1)
        """Negatives with a smaller cosine are left alone."""

    options: Options

    def anchor_values(self, pairs: PairMatrix) -> tuple[Tensor, Tensor]:
        """Sum over an anchor's pairs, and 1 if there are any. See ``PairwiseLoss.anchor_values``."""
        attraction = (1 - pairs.cosine).masked_fill(~pairs.positive, 0.0)
        repulsion = torch.relu(pairs.cosine - self.options.margin).masked_fill(~pairs.negative, 0.0)
        return (attraction + repulsion).sum(1), (pairs.positive | pairs.negative).any(1).long()
