"""Images that are stored twice or more: they spoil a measurement if they are in two splits, and a training if in two classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_EXAMPLES = 5


class Groups(NamedTuple):
    """Rows (r,) of groups one after another, the group (r,) of each, and per group (g,): it is in several classes, in several splits."""

    rows: NDArray[np.int64]
    group: NDArray[np.int64]
    across_classes: NDArray[np.bool_]
    across_splits: NDArray[np.bool_]

    def members(self, group: int) -> list[int]:
        """The rows of a group."""
        start, stop = np.searchsorted(self.group, [group, group + 1])
        return self.rows[start:stop].tolist()

    def examples(self) -> list[int]:
        """Some groups: those in several splits first, then those in several classes."""
        return np.lexsort((~self.across_classes, ~self.across_splits))[:_EXAMPLES].tolist()


def find_groups(digests: bytes, labels: NDArray[np.int64], splits: NDArray[np.uint8]) -> Groups:
    """The groups of rows whose 16-byte digests are equal, in the order of their first rows.

    Args:
        digests: n of them, one after another.
        labels: (n,).
        splits: (n,).
    """
    keys = np.frombuffer(digests, np.dtype([("high", "<u8"), ("low", "<u8")]))
    _, first, which, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(counts[which] > 1)
    rows = rows[np.lexsort((rows, first[which[rows]]))]
    begins = np.flatnonzero(np.diff(which[rows], prepend=-1))
    group = np.repeat(np.arange(len(begins)), np.diff([*begins, len(rows)]))

    def differ(values: NDArray[np.int64] | NDArray[np.uint8]) -> NDArray[np.bool_]:
        return np.bincount(group, values[rows] != values[rows[begins]][group], len(begins)) > 0

    return Groups(rows, group, differ(labels), differ(splits))
