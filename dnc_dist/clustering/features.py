"""Features spread over ranks, with the collectives that reach the others; up to ``REPLICATED_ROWS`` every rank holds all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnc_dist.clustering.sums import GroupSums, energy, exponent_votes, highest_exponent, in_order
from dnc_dist.processes import distributed

REPLICATED_ROWS = 100_000
"""Up to so many rows every rank gathers all of them and computes the same; on GPUs, too, results are then equal bit for bit for any W."""

VOTE_EVERY = 16

Collective = Callable[[Tensor], Tensor]


def _alone(tensor: Tensor) -> Tensor:
    return tensor


class Features(NamedTuple):
    """This rank's part of ``total`` rows of features, one for each place of the set that is divided.

    Arrays over all rows have one entry for each place, on every rank.

    Without the fields that have defaults these are all rows, and this rank works for itself.
    """

    local: Tensor  # (n, F)
    start: int  # place of the first local row; ranks hold consecutive places in rank order
    total: int
    all_reduce: Collective = _alone  # sums a tensor over ranks
    gather: Collective = _alone  # concatenates rows of all ranks in rank order
    replicated_rows: int = REPLICATED_ROWS
    device: torch.device = torch.device("cpu")  # where k-means may run

    @classmethod
    def alone(cls, x: Tensor) -> Features:
        """All rows x (N, F), on their device; nothing of them lies on another rank."""
        return cls(x, 0, len(x), device=x.device)

    def replicated(self) -> Features:
        """Collective. All rows on every rank."""
        return self._replace(local=self.gather(self.local).to(self.local.device), start=0, all_reduce=_alone, gather=_alone)

    def mine(self, values: np.ndarray) -> np.ndarray:
        """The entries (n,) of an array (total,) that belong to the local rows."""
        return values[self.start : self.start + len(self.local)]

    def select(self, chosen: np.ndarray) -> Features:
        """The rows with a True in ``chosen`` (total,); their places are those among the chosen."""
        local = self.local[torch.from_numpy(self.mine(chosen))]
        return self._replace(local=local, start=int(chosen[: self.start].sum()), total=int(chosen.sum()))

    def replaced(self, values: np.ndarray, group: np.ndarray) -> Features:
        """In place of each row the value (of G, F, float32) of its group, one number below G for each of the ``total`` rows."""
        return self._replace(local=torch.from_numpy(values[self.mine(group)]).to(self.local.device))

    def gather_numbers(self, numbers: Tensor, below: int) -> np.ndarray:
        """Collective. (total,) int64 from this rank's (n,) in 0..below-1, which travel as bytes where that is enough."""
        return self.gather(numbers.to(torch.uint8 if below <= 256 else torch.int32)).numpy().astype(np.int64)

    def means(self, group: np.ndarray, num_groups: int) -> np.ndarray:
        """Collective. (num_groups, F) float64 means of the rows with each number; 0 for a number without rows."""
        x = self.local.numpy()
        sums = GroupSums(x, num_groups, self._exponent(), self.total)
        sums.move(np.full(len(x), -1), self.mine(group))
        counts = np.bincount(group, minlength=num_groups)
        return self.all_reduce(torch.from_numpy(sums.values)).numpy() / np.maximum(counts, 1)[:, None]

    def scatter_around(self, group: np.ndarray, means: np.ndarray) -> float:
        """Collective. The sum of squared distances of all rows to the mean of their group, from the second moments."""
        own = torch.tensor([energy(self.local.numpy(), self._exponent(), self.total)], dtype=torch.float64)
        between = np.bincount(group, minlength=len(means))[:, None] * np.square(means)
        return max(0.0, float(self.all_reduce(own)) - in_order(between))

    def _exponent(self) -> int:
        """Collective. That of a power of two that no value of any rank is above."""
        largest = float(torch.linalg.vector_norm(self.local, torch.inf)) if self.local.numel() else 0.0
        return highest_exponent(self.all_reduce(torch.from_numpy(exponent_votes(largest))).numpy())


def spread_features(
    local: Tensor,
    start: int,
    total: int,
    *,
    device: torch.device | None = None,
    replicated_rows: int = REPLICATED_ROWS,
    vote: Callable[[], None] = lambda: None,
) -> Features:
    """Collective. Features of all ranks; few enough are gathered, and everything after is then the same computation on every rank.

    Args:
        local: (n, F) features of this rank; n may be 0.
        start: place of its first row; ranks hold consecutive places in rank order.
        total: N, rows of all ranks.
        device: where tensors travel between ranks, and where k-means may run; None: ``distributed.device()``.
        replicated_rows: up to so many rows every rank gathers all of them.
        vote: collective; called after every few sums over ranks, it raises on every rank if the work is to be abandoned. Ranks that
            each compute for themselves do not vote: they have nothing that keeps them in step.

    Returns:
        Features in fp32 on the CPU.
    """
    device = distributed.device() if device is None else device
    spread = Features(local.detach().float(), start, total, _Sums(vote, device), _Gather(device), replicated_rows, device)
    if total <= replicated_rows:
        spread = spread.replicated()
    return spread._replace(local=spread.local.cpu())


class _Sums:
    """Sums over ranks that now and then ask whether to go on; all ranks come to the question together."""

    def __init__(self, vote: Callable[[], None], device: torch.device) -> None:
        self.vote, self.device, self.calls = vote, device, 0

    def __call__(self, tensor: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % VOTE_EVERY == 0:
            self.vote()
        return distributed.all_reduce_sum(tensor.to(self.device)).to(tensor.device)


class _Gather:
    """Rows of all ranks, on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, tensor: Tensor) -> Tensor:
        return distributed.gather_rows(tensor.to(self.device)).cpu()
