"""ArcFace (Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, CVPR 2019)."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dnc_dist.loss.whole_batch import BatchLoss


class ArcFaceLoss(BatchLoss):
    """Classification with one learned weight per class: cross-entropy of scale · cos(θ + margin) for the own class (equation 3).

    Beyond π - margin, where cos(θ + margin) would grow again, the own class has cos θ - margin · sin(margin), as in the authors' code.
    """

    class Options(BatchLoss.Options):
        """ArcFace, a classification with an angular margin (Deng et al., CVPR 2019)."""

        margin: float = Field(0.5, ge=0, lt=1.57)
        """Angle that is added between a row and the weight of its class, in radians."""
        scale: float = Field(64.0, gt=0)
        """Factor on the cosines."""

    options: Options

    def __init__(self, options: Options, *, num_classes: int, embedding_dim: int) -> None:
        super().__init__(options, num_classes=num_classes, embedding_dim=embedding_dim)
        self.weights = nn.Parameter(torch.empty(num_classes, embedding_dim))
        nn.init.normal_(self.weights)

    def forward(self, z: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean over the rows. See ``BatchLoss.forward``."""
        margin = self.options.margin
        cosine = z @ self.project(self.weights, mask).to(z.dtype).T  # (n, C)
        own = cosine.gather(1, labels[:, None])
        # The slope of the root is infinite where the angle is 0 or π: the floor takes it away there.
        sine = (1 - own.square()).clamp_min(torch.finfo(own.dtype).eps).sqrt()
        shifted = own * math.cos(margin) - sine * math.sin(margin)
        shifted = torch.where(own >= -math.cos(margin), shifted, own - margin * math.sin(margin))
        return cross_entropy(self.options.scale * cosine.scatter(1, labels[:, None], shifted), labels)
