"""Protocols that say who asks and who is searched, and measure all of it at once."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from torch import Tensor

from dnc_dist.retrieval.protocols.base import Columns, Protocol, RetrievalResult
from dnc_dist.retrieval.protocols.exact import evaluate


class RolesProtocol(Protocol):
    """Base of protocols that are two roles: recall@k, map@r and r_precision of all queries in one gallery."""

    @abstractmethod
    def roles(self, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        """(N,) bool which rows ask, and (N,) bool which are searched; a row may be both and does not find itself."""

    def measure(self, embeddings: Tensor, rows: Tensor, columns: Columns, recall_at: tuple[int, ...]) -> dict[str, RetrievalResult]:
        query, gallery = self.roles(columns)
        return {"": evaluate(embeddings, rows, columns.labels, query, gallery, protocol=self.name, recall_at=recall_at, tick=self.tick)}
