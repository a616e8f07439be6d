"""Queries ask a gallery, as the data says who is what."""

from __future__ import annotations

import numpy as np

from dnc_dist.base.errors import InputError
from dnc_dist.retrieval.protocols.base import Columns, Protocol
from dnc_dist.retrieval.protocols.roles import RolesProtocol


class QueryGallery(RolesProtocol):
    """Queries ask a gallery; the roles come from the data."""

    @classmethod
    def suits(cls, columns: Columns) -> bool:
        return not columns.lists and not (columns.query.all() and columns.gallery.all())

    def for_data(self, columns: Columns) -> Protocol:
        if not columns.query.any() or not columns.gallery.any():
            raise InputError(
                f"the protocol query-gallery needs queries and a gallery, but the data has {columns.query.sum()} and "
                f"{columns.gallery.sum()} such rows; set data.protocol=leave-one-out or give the roles when the data is prepared"
            )
        return self

    def roles(self, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        return columns.query, columns.gallery
