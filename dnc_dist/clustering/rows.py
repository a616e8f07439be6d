"""Rows spread over ranks, with the collectives that reach the others; up to ``REPLICATED_ROWS`` every rank holds all of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnc_dist import distributed
from dnc_dist.clustering.centroids import Collective
from dnc_dist.clustering.kmeans import SUM_BLOCK, sum_by_group


class Rows(NamedTuple):
    """This rank's part of ``total`` rows; arrays over all rows have one entry for each, in this order, on every rank."""

    local: Tensor  # (n, F) float32 on the CPU
    start: int  # position of the first local row among all
    total: int
    all_reduce: Collective
    gather: Collective

    def mine(self, values: np.ndarray) -> np.ndarray:
        """The entries (n,) of an array (total,) that belong to the local rows."""
        return values[self.start : self.start + len(self.local)]

    def select(self, chosen: np.ndarray) -> Rows:
        """The rows with a True in ``chosen`` (total,), renumbered."""
        local = self.local[torch.from_numpy(self.mine(chosen))]
        return self._replace(local=local, start=int(chosen[: self.start].sum()), total=int(chosen.sum()))

    def means(self, group: np.ndarray, num_groups: int) -> np.ndarray:
        """Collective. (num_groups, F) float64 means of the rows with each number; 0 for a number without rows."""
        sums = sum_by_group(self.local.numpy(), self.mine(group), num_groups)
        counts = np.bincount(group, minlength=num_groups)
        return self.all_reduce(torch.from_numpy(sums)).numpy() / np.maximum(counts, 1)[:, None]

    def scatter_around(self, group: np.ndarray, means: np.ndarray) -> float:
        """Collective. The sum of squared distances of all rows to the mean of their group, from the second moments."""
        energy = torch.tensor([sum(float(block.double().square().sum()) for block in self.local.split(SUM_BLOCK))], dtype=torch.float64)
        between = np.bincount(group, minlength=len(means)) @ np.square(means).sum(1)
        return max(0.0, float(self.all_reduce(energy)) - float(between))


def _all_reduce(tensor: Tensor) -> Tensor:
    return distributed.all_reduce_sum(tensor.to(distributed.device())).to(tensor.device)


def _gather(tensor: Tensor) -> Tensor:
    return distributed.gather_rows(tensor.to(distributed.device())).cpu()


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def spread_rows(local: Tensor, start: int, total: int, replicated_rows: int) -> Rows:
    """Collective. Rows of all ranks; few enough are gathered, and everything after is then the same computation on every rank."""
    local = local.detach().float()
    if total <= replicated_rows:
        return Rows(_gather(local), 0, total, _alone, _alone)
    return Rows(local.cpu(), start, total, _all_reduce, _gather)
