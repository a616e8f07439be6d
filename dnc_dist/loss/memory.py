"""Past embeddings as further references (Wang et al., Cross-Batch Memory for Embedding Learning, CVPR 2020).

An embedding changes slowly once a network has trained for a while. So those of past batches can serve as references, and an anchor
meets many more negatives than a batch has. They take no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EMPTY = -1
"""The learner of a place that holds no row: it is in no pair."""


class Memory(nn.Module):
    """The embeddings of the last ``size`` rows in a ring, the same on every rank. They are buffers, and so a part of checkpoints.

    ``z`` (size, D) unit rows in the subspace of their learner; ``labels`` and ``learner`` (size,) int64; ``next`` () int64, the place
    that is overwritten next.
    """

    z: Tensor
    labels: Tensor
    learner: Tensor
    next: Tensor

    def __init__(self, size: int, embedding_dim: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("z", torch.zeros(size, embedding_dim))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("learner", torch.full((size,), EMPTY))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    @property
    def row_ids(self) -> Tensor:
        """(size,) names of the rows in the ring: -2, -3, ... by place.

        They are no rows of the dataset. As in the paper, an image in the batch and a past embedding of it are a positive pair.
        """
        return torch.arange(-2, -2 - self.size, -1, device=self.labels.device)

    @torch.no_grad()
    def store(self, z: Tensor, labels: Tensor, learner: Tensor) -> None:
        """Put rows in the places of the oldest ones, in their order; those of learner -1 are left out. Nothing waits for the device.

        Args:
            z: (n, D); labels, learner (n,) int64. All are equal on every rank. Of more rows than places the first are kept.
        """
        kept = learner >= 0
        order = (~kept).int().argsort(stable=True)[: self.size]
        kept, place = kept[order], (self.next + torch.arange(len(order), device=order.device)) % self.size
        for ring, rows in ((self.z, z), (self.labels, labels), (self.learner, learner)):
            # How many rows are left out must not decide a shape, so they come last, and each leaves its place as it is.
            chosen = kept.view(-1, *[1] * (rows.dim() - 1))
            ring.index_copy_(0, place, torch.where(chosen, rows.detach()[order].to(ring.dtype), ring[place]))
        self.next.add_(kept.sum()).remainder_(self.size)

    def clear(self) -> None:
        """Forget all rows."""
        for value, empty in ((self.z, 0), (self.labels, 0), (self.learner, EMPTY), (self.next, 0)):
            value.fill_(empty)
