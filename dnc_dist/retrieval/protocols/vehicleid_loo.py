"""VehicleID as metric learning measures it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from dnc_dist.retrieval.protocols.base import Columns, RetrievalResult
from dnc_dist.retrieval.protocols.exact import evaluate
from dnc_dist.retrieval.protocols.vehicleid import VehicleId


class VehicleIdLeaveOneOut(VehicleId):
    """VehicleID for metric learning: every image of a list asks all others of that list."""

    @classmethod
    def suits(cls, columns: Columns) -> bool:
        return bool(columns.lists)

    def measure_list(
        self,
        name: str,
        embeddings: Tensor,
        rows: Tensor,
        columns: Columns,
        recall_at: tuple[int, ...],
        tick: Callable[[int, int], None],
    ) -> RetrievalResult:
        everything = np.ones(len(columns), bool)
        return evaluate(embeddings, rows, columns.labels, everything, everything, protocol=self.name, recall_at=recall_at, tick=tick)
