"""Proxy-Anchor loss (Kim et al., Proxy Anchor Loss for Deep Metric Learning, CVPR 2020)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

import dnc_kernels


class ProxyAnchorLoss(nn.Module):
    """Whole-batch: one learned proxy per class is the anchor, the rows of the batch are its positives and negatives.

    Args:
        num_classes: C.
        embedding_dim: D.
        margin: δ of equation 4.
        scale: α of equation 4.
    """

    kind: ClassVar[str] = "whole_batch"

    def __init__(self, num_classes: int, embedding_dim: int, *, margin: float = 0.1, scale: float = 32.0) -> None:
        super().__init__()
        self.margin, self.scale = margin, scale
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_dim))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")  # as the authors do

    def forward(self, z: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss () of one learner's whole batch (equation 4).

        Args:
            z: (n, D), projected into the learner's subspace and normalised.
            labels: (n,) int64, 0 to C-1; a row with a negative label counts nowhere.
            mask: (D,) the learner's subspace mask, which projects the proxies as it did z; None: the whole embedding.

        Raises:
            ValueError: on CPU, a label without proxy.
        """
        num_classes = self.proxies.shape[0]
        if labels.device.type == "cpu" and labels.numel() and int(labels.max()) >= num_classes:
            raise ValueError(f"labels contains {int(labels.max())}; allowed are 0 to {num_classes - 1}, one per proxy")
        proxies = dnc_kernels.project(self.proxies, None, None if mask is None else mask[None])
        dtype = torch.promote_types(z.dtype, proxies.dtype)
        cosine = z.to(dtype) @ proxies.to(dtype).T  # (n, C)
        present = (labels >= 0)[:, None]
        positive = labels[:, None] == torch.arange(num_classes, device=labels.device)
        attraction = (-self.scale * (cosine - self.margin)).masked_fill(~positive, -torch.inf)
        repulsion = (self.scale * (cosine + self.margin)).masked_fill(positive | ~present, -torch.inf)
        with_positives = positive.any(0).sum().clamp_min(1)
        return _log_one_plus_sum(attraction).sum() / with_positives + _log_one_plus_sum(repulsion).sum() / num_classes


def _log_one_plus_sum(exponents: Tensor) -> Tensor:
    """log(1 + Σ_n exp(x_nc)) per column, (n, C) -> (C,); the row of zeros is the 1 and keeps empty columns finite."""
    return torch.cat([exponents.new_zeros(1, exponents.shape[1]), exponents]).logsumexp(0)
