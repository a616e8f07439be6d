"""SoftTriple (Qian et al., SoftTriple Loss: Deep Metric Learning Without Triplet Sampling, ICCV 2019)."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from dnc_dist.loss.whole_batch import BatchLoss


class SoftTripleLoss(BatchLoss):
    """Classification with several learned centres per class: cross-entropy of scale · (S_c - margin for the own class) (equation 8).

    S_c = Σ_k softmax_k(cos_ck / γ) cos_ck over the centres k of a class. The centres of a class are drawn together, so that it takes no
    more of them than it needs: their distances, each pair once, are added up and divided by C K (K-1), times ``merge`` (equation 9).
    """

    class Options(BatchLoss.Options):
        """SoftTriple, a classification with several centres per class (Qian et al., ICCV 2019)."""

        centres: int = Field(10, ge=1)
        """Centres per class."""
        scale: float = Field(20.0, gt=0)
        """Factor λ on the similarities."""
        gamma: float = Field(0.1, gt=0)
        """γ: the smaller, the more the nearest centre of a class counts alone."""
        margin: float = Field(0.01, ge=0)
        """By how much the own class should win, as a similarity."""
        merge: float = Field(0.2, ge=0)
        """Weight τ of the term that draws the centres of a class together."""

    options: Options

    def __init__(self, options: Options, *, num_classes: int, embedding_dim: int) -> None:
        super().__init__(options, num_classes=num_classes, embedding_dim=embedding_dim)
        self.centres = nn.Parameter(torch.empty(num_classes * options.centres, embedding_dim))
        nn.init.kaiming_uniform_(self.centres, a=math.sqrt(5))  # as the authors do

    def forward(self, z: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean over the rows, and the term of the centres. See ``BatchLoss.forward``."""
        options = self.options
        centres = self.project(self.centres, mask).to(z.dtype).view(self.num_classes, options.centres, -1)
        cosine = torch.einsum("nd,ckd->nck", z, centres)
        similarity = ((cosine / options.gamma).softmax(2) * cosine).sum(2)  # (n, C)
        own = one_hot(labels, self.num_classes).to(z.dtype)
        loss = cross_entropy(options.scale * (similarity - options.margin * own), labels)
        if options.merge == 0 or options.centres == 1:
            return loss
        first, second = torch.triu_indices(options.centres, options.centres, 1, device=z.device).unbind(0)
        squared = 2 - 2 * (centres @ centres.transpose(1, 2))[:, first, second]  # (C, pairs)
        # The slope of the root is infinite at 0: the floor takes it away there.
        return loss + 0.5 * options.merge * squared.clamp_min(torch.finfo(z.dtype).eps).sqrt().mean()
