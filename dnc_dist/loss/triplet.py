"""Triplet loss (Schroff et al., FaceNet: A Unified Embedding for Face Recognition and Clustering, CVPR 2015)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dnc_dist.loss.pairwise import PairMatrix, PairwiseLoss


class TripletLoss(PairwiseLoss):
    """relu(d²_ap - d²_an + margin) over triplets of squared Euclidean distances (equation 3), averaged over the active ones.

    A negative is semi-hard for a positive if it is farther away than this one, but by less than the margin (equation 4). The paper
    draws one such negative for each positive; here all of them take part.
    """

    class Options(PairwiseLoss.Options):
        """Triplet loss on squared distances (Schroff et al., CVPR 2015)."""

        margin: float = Field(0.2, gt=0, le=4)
        """By how much the squared distance to a negative should exceed that to a positive."""
        triplets: Literal["semi_hard", "all"] = "semi_hard"
        """`semi_hard`: only negatives farther away than the positive; `all`: also nearer ones."""

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"triplets": "all"})
    options: Options

    def anchor_values(self, pairs: PairMatrix) -> tuple[Tensor, Tensor]:
        """Sum over an anchor's active triplets, and their number. See ``PairwiseLoss.anchor_values``."""
        positive, exists = pairs.positives()
        # Squared distances of unit vectors are 2 - 2 cos.
        farther = 2 * (positive[:, :, None] - pairs.cosine[:, None, :])  # (b, P, G)
        taken = exists[:, :, None] & pairs.negative[:, None, :]
        if self.options.triplets == "semi_hard":
            taken = taken & (farther > 0)
        terms = torch.relu(self.options.margin - farther).masked_fill(~taken, 0.0)
        return terms.sum((1, 2)), (terms > 0).sum((1, 2))
