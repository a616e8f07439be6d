"""The protocol that suits the data."""

from __future__ import annotations

from torch import Tensor

from dnc_dist.base import parts
from dnc_dist.retrieval.protocols.base import Columns, Protocol, RetrievalResult


class Auto(Protocol):
    """The protocol that suits the data: vehicleid-loo for VehicleID's lists, query-gallery if there are such roles, else leave-one-out."""

    def for_data(self, columns: Columns) -> Protocol:
        name = next(name for name in parts.TABLE["protocol"] if parts.load("protocol", name).suits(columns))
        chosen: Protocol = parts.build("protocol", name)
        chosen.tick = self.tick
        return chosen.for_data(columns)

    def measure(self, embeddings: Tensor, rows: Tensor, columns: Columns, recall_at: tuple[int, ...]) -> dict[str, RetrievalResult]:
        return self.for_data(columns).measure(embeddings, rows, columns, recall_at)
