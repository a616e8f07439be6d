"""Proxy-Anchor loss (Kim et al., Proxy Anchor Loss for Deep Metric Learning, CVPR 2020)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dnc_dist.loss.whole_batch import BatchLoss


class ProxyAnchorLoss(BatchLoss):
    """One learned proxy per class is the anchor, the rows of the batch are its positives and negatives."""

    class Options(BatchLoss.Options):
        """Proxy-Anchor loss (Kim et al., CVPR 2020), computed on the whole global batch."""

        margin: float = Field(0.1, ge=0)
        """Margin on the cosine similarity."""
        scale: float = Field(32.0, gt=0)
        """Factor on the similarities."""

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"scale": 16.0},)
    options: Options

    def __init__(self, options: Options, *, num_classes: int, embedding_dim: int) -> None:
        super().__init__(options, num_classes=num_classes, embedding_dim=embedding_dim)
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_dim))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")  # as the authors do

    def forward(self, z: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss () of one learner's whole batch (equation 4, with margin δ and scale α). See ``BatchLoss.forward``.

        A row with a negative label counts nowhere.

        Raises:
            ValueError: on CPU, a label without proxy.
        """
        num_classes, margin, scale = self.num_classes, self.options.margin, self.options.scale
        if labels.device.type == "cpu" and labels.numel() and int(labels.max()) >= num_classes:
            raise ValueError(f"labels contains {int(labels.max())}; allowed are 0 to {num_classes - 1}, one per proxy")
        proxies = self.project(self.proxies, mask)
        dtype = torch.promote_types(z.dtype, proxies.dtype)
        cosine = z.to(dtype) @ proxies.to(dtype).T  # (n, C)
        present = (labels >= 0)[:, None]
        positive = labels[:, None] == torch.arange(num_classes, device=labels.device)
        attraction = (-scale * (cosine - margin)).masked_fill(~positive, -torch.inf)
        repulsion = (scale * (cosine + margin)).masked_fill(positive | ~present, -torch.inf)
        with_positives = positive.any(0).sum().clamp_min(1)
        return _log_one_plus_sum(attraction).sum() / with_positives + _log_one_plus_sum(repulsion).sum() / num_classes


def _log_one_plus_sum(exponents: Tensor) -> Tensor:
    """log(1 + Σ_n exp(x_nc)) per column, (n, C) -> (C,); the row of zeros is the 1 and keeps empty columns finite."""
    return torch.cat([exponents.new_zeros(1, exponents.shape[1]), exponents]).logsumexp(0)
