"""Every image asks all others."""

from __future__ import annotations

import numpy as np

from dnc_dist.retrieval.protocols.base import Columns
from dnc_dist.retrieval.protocols.roles import RolesProtocol


class LeaveOneOut(RolesProtocol):
    """Every image asks all others, whatever their roles are."""

    @classmethod
    def suits(cls, columns: Columns) -> bool:
        return not columns.lists and bool(columns.query.all() and columns.gallery.all())

    def roles(self, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        everything = np.ones(len(columns), bool)
        return everything, everything
