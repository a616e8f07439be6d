"""N-pairs loss (Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss Objective, NIPS 2016)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from dnc_dist.loss.pairwise import PairMatrix, PairwiseLoss, log_one_plus_exp, logsumexp


class NPairsLoss(PairwiseLoss):
    """log(1 + Σ_n exp(scale (s_an - s_ap))) with cosines s (equation 6), averaged over all positive pairs.

    The paper takes two rows of each class and leaves embeddings unnormalised; here every positive pair is taken, against all
    negatives of its anchor, and ``scale`` stands for the length of the embeddings.
    """

    class Options(PairwiseLoss.Options):
        """N-pairs loss on cosines (Sohn, NIPS 2016): each positive pair against all negatives of its anchor."""

        scale: float = Field(16.0, gt=0)
        """Factor on the cosines, the inverse of a temperature."""

    options: Options

    def anchor_values(self, pairs: PairMatrix) -> tuple[Tensor, Tensor]:
        """Sum over an anchor's positives, and their number; 0 without negatives. See ``PairwiseLoss.anchor_values``."""
        positive, exists = pairs.positives()
        negatives = logsumexp(self.options.scale * pairs.cosine, pairs.negative)
        exists = exists & pairs.negative.any(1, keepdim=True)
        terms = log_one_plus_exp(negatives[:, None] - self.options.scale * positive).masked_fill(~exists, 0.0)
        return terms.sum(1), exists.sum(1)
