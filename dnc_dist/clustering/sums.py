"""Sums over rows that are exact, and therefore the same in any order: for any spread over ranks, any threads, any blocks.

Every value is rounded to a multiple of a power of two, so coarse that no sum of all rows leaves the 53 bits in which float64
adds such multiples without rounding, and so fine that it loses less than the float32 centroid that comes of the sum.
"""

from __future__ import annotations

import math

import numpy as np

from dnc_dist.base.exact import squared_distance

BLOCK_ELEMENTS = 1 << 16
"""Of float64 work at a time: it stays in the processor's cache."""
MOVED_ELEMENTS = 1 << 21
"""Of rows that move at a time: enough that preparing their product costs little."""
_LOWEST, EXPONENTS = -150, 280  # 2^-150 .. 2^129: every float32 lies below one of these powers of two


def blocks(num_rows: int, width: int, elements: int = BLOCK_ELEMENTS) -> list[slice]:
    """The rows of ``width`` columns in pieces of about so many elements."""
    step = max(1, elements // max(1, width))
    return [slice(at, min(at + step, num_rows)) for at in range(0, num_rows, step)]


def exponent_votes(largest: float) -> np.ndarray:
    """(E,) int64, a one where the smallest power of two above ``largest`` stands: sums over ranks tell ``highest_exponent``."""
    votes = np.zeros(EXPONENTS, np.int64)
    votes[math.frexp(largest)[1] - _LOWEST] = 0 < largest < math.inf
    return votes


def highest_exponent(votes: np.ndarray) -> int:
    """The exponent of the highest power of two that a rank voted for."""
    return int(np.flatnonzero(votes).max(initial=0)) + _LOWEST


class Grid:
    """The multiples of a power of two among which ``terms`` values, all at most ``2**exponent``, add without rounding."""

    def __init__(self, exponent: int, terms: int) -> None:
        # Around 1.5 * 2^52 units float64 holds whole units only: what is added and taken away again is rounded to them.
        self._shift = 1.5 * 2.0 ** (exponent + max(1, terms).bit_length() + 1)

    def round(self, values: np.ndarray) -> np.ndarray:
        """float64 values, rounded in place: to 2^-51 of ``terms * 2**exponent`` or a little more."""
        values += self._shift
        values -= self._shift
        return values


class GroupSums:
    """Sums of rows by group, kept up as rows move from group to group.

    Args:
        x: (n, D) float32.
        num_groups: K.
        exponent: no value of any rank is above ``2**exponent``.
        total: N, rows of all ranks.
    """

    def __init__(self, x: np.ndarray, num_groups: int, exponent: int, total: int) -> None:
        self._x, self._grid = x, Grid(exponent, total)
        self.values = np.zeros((num_groups, x.shape[1]))  # (K, D)

    def move(self, before: np.ndarray, now: np.ndarray) -> int:
        """Rows go from the groups (n,) ``before`` to ``now``; -1 is none. Returns how many moved."""
        # Here, as it takes a tenth of a second to import: a run without clusters, or on a GPU, does without.
        from scipy.sparse import csr_matrix

        moved = np.flatnonzero(before != now)
        for block in blocks(len(moved), self._x.shape[1], MOVED_ELEMENTS):
            rows = moved[block]
            left = before[rows] >= 0
            column = np.arange(len(rows))
            groups, entry = np.unique(np.concatenate([now[rows], before[rows][left]]), return_inverse=True)
            sign = np.concatenate([np.ones(len(rows)), np.full(left.sum(), -1.0)])
            change = csr_matrix((sign, (entry, np.concatenate([column, column[left]]))), shape=(len(groups), len(rows)))
            self.values[groups] += change @ self._grid.round(np.take(self._x, rows, 0).astype(np.float64))
        return len(moved)


def energy(x: np.ndarray, exponent: int, total: int) -> float:
    """Sum of the squared lengths of the rows (n, D) float32; arguments as ``GroupSums``."""
    grid, origin = Grid(2 * exponent + x.shape[1].bit_length(), total), np.zeros(1, np.float32)
    return float(sum(grid.round(squared_distance(x[block], origin)).sum() for block in blocks(len(x), x.shape[1])))


def in_order(values: np.ndarray) -> float:
    """The sum of the values, added one by one in their order, whatever the processor."""
    return float(np.cumsum(values)[-1]) if values.size else 0.0
