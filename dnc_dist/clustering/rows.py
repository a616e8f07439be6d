"""Rows spread over ranks, with the collectives that reach the others; up to ``REPLICATED_ROWS`` every rank holds all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnc_dist.clustering.centroids import Collective
from dnc_dist.clustering.kmeans import SUM_BLOCK, sum_by_group
from dnc_dist.processes import distributed

VOTE_EVERY = 16


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

    def gather_numbers(self, numbers: Tensor, below: int) -> np.ndarray:
        """Collective. (total,) int64 from this rank's (n,) in 0..below-1, which travel as bytes where that is enough."""
        return self.gather(numbers.to(torch.uint8 if below <= 256 else torch.int32)).numpy().astype(np.int64)

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


class _Sums:
    """Sums over ranks that now and then ask whether to go on; all ranks come to the question together."""

    def __init__(self, vote: Callable[[], None]) -> None:
        self.vote, self.calls = vote, 0

    def __call__(self, tensor: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % VOTE_EVERY == 0:
            self.vote()
        return distributed.all_reduce_sum(tensor.to(distributed.device())).to(tensor.device)


def _gather(tensor: Tensor) -> Tensor:
    return distributed.gather_rows(tensor.to(distributed.device())).cpu()


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def spread_rows(local: Tensor, start: int, total: int, replicated_rows: int, vote: Callable[[], None]) -> Rows:
    """Collective. Rows of all ranks; few enough are gathered, and everything after is then the same computation on every rank.

    Args:
        vote: collective; called after every few sums over ranks, it raises on every rank if the work is to be abandoned. Ranks that
            each compute for themselves do not vote: they have nothing that keeps them in step.
    """
    local = local.detach().float()
    if total <= replicated_rows:
        return Rows(_gather(local), 0, total, _alone, _alone)
    return Rows(local.cpu(), start, total, _Sums(vote), _gather)
