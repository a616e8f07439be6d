"""What the two protocols of VehicleID share, which are up to 18 points apart: each test list (small, medium, large) is measured on its own.

With one right answer per query, recall@k is what re-identification calls CMC@k, and ``map`` is the mean of 1 / place.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnc_dist.base.errors import InputError
from dnc_dist.retrieval.protocols.base import Columns, Protocol, RetrievalResult
from dnc_dist.retrieval.protocols.exact import check_finite

RECALL_AT = (1, 5)


def _with_own(recall_at: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({*recall_at, *RECALL_AT}))


class VehicleId(Protocol):
    """Base of the two: the lists, each with the embeddings of its own rows."""

    def lists(self, columns: Columns) -> Mapping[str, np.ndarray]:
        """The lists that are measured; held-out training classes are in none, so they are one."""
        if not columns.lists and columns.view == "validation":
            return {columns.view: np.ones(len(columns), bool)}
        return columns.lists

    def for_data(self, columns: Columns) -> Protocol:
        if not self.lists(columns):
            raise InputError(
                f"the protocol {self.name} needs the lists small, medium and large, but the data has none; set data.protocol=auto, or let "
                f"data.root name what `dnc-dist data prepare vehicleid` wrote"
            )
        return self

    def parameters(self, recall_at: tuple[int, ...]) -> dict[str, Any]:
        return super().parameters(_with_own(recall_at))

    def headline(self, lists: Sequence[str]) -> str:
        """Large, which published tables show."""
        return "large" if "large" in lists else lists[0]

    def members(self, name: str, columns: Columns) -> np.ndarray:
        return self.lists(columns)[name]

    def measure(self, embeddings: Tensor, rows: Tensor, columns: Columns, recall_at: tuple[int, ...]) -> dict[str, RetrievalResult]:
        """Collective. The results of each list; recall@k besides the protocols' own 1 and 5."""
        check_finite(embeddings)
        at, rows, lists = _with_own(recall_at), rows.cpu(), self.lists(columns)
        results, before, every = {}, 0, sum(int(members.sum()) for members in lists.values())
        for name, members in lists.items():
            mine, size = torch.from_numpy(members)[rows], int(members.sum())
            tick = partial(self._tick, before, size, every)
            results[name] = self.measure_list(name, embeddings[mine.to(embeddings.device)], rows[mine], columns, at, tick)
            before += size
        return results

    def _tick(self, before: int, size: int, every: int, done: int, total: int) -> None:
        """A list counts as many queries as it has rows, however often each of them asks."""
        self.tick(before + size * done // max(total, 1), every)

    @abstractmethod
    def measure_list(
        self,
        name: str,
        embeddings: Tensor,
        rows: Tensor,
        columns: Columns,
        recall_at: tuple[int, ...],
        tick: Callable[[int, int], None],
    ) -> RetrievalResult:
        """Collective. The result of one list from the embeddings (n, D) of this rank's rows (n,) of it; ``tick`` hears how far it is.

        Raises:
            InputError: no query has a gallery row of its class.
        """
