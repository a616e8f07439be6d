"""The nearest centroid of each row on the CPU: the argmin of float64 distances, the lowest index winning.

A float32 product proposes. Centroids whose float32 distances are closer to the smallest than float32 can tell are compared
again in float64, added in a fixed order. So neither BLAS, threads nor block shapes show in the result.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dnc_dist.base.exact import FLOAT32_ROUNDING, gram_error, squared_distance
from dnc_dist.clustering.sums import blocks

PRODUCT_ELEMENTS = 1 << 22
PRODUCT_ROWS = 512
WORTH_SKIPPING = 512
"""So many centroids that stayed pay for the float64 distances that it takes to leave them out."""


def nearest_of(x: np.ndarray, rows: np.ndarray, centroids: np.ndarray, beat: Callable[[], None] = lambda: None) -> np.ndarray:
    """(r,) int64 nearest centroid of the rows x[rows].

    Args:
        x: (n, D) float32.
        rows: (r,) int64.
        centroids: (k, D) float32.
        beat: called per block of rows.
    """
    found = np.zeros(len(rows), np.int64)
    if len(centroids) == 1:
        return found
    # Distances from a point amid the centroids: smaller numbers, smaller errors, also for rows that all point the same way.
    middle = centroids.mean(0)
    around = centroids - middle
    squares = np.square(around.astype(np.float64)).sum(1)
    longest = np.sqrt(squares.max())
    squares, factors = squares.astype(np.float32), np.ascontiguousarray((-2 * around).T)
    # Roundings that gram_error does not count: of row and centroid around the middle, each in the product and in the distance.
    width = centroids.shape[1] + 4
    step = max(1, min(PRODUCT_ROWS, PRODUCT_ELEMENTS // len(centroids)))
    space = np.empty((step, x.shape[1]), np.float32)
    for at in range(0, len(rows), step):
        beat()
        block = slice(at, at + step)
        part = np.take(x, rows[block], 0, out=space[: len(rows[block])], mode="clip")
        part -= middle
        length = np.sqrt(np.einsum("ij,ij->i", part, part)) * (1 + width * FLOAT32_ROUNDING)
        distance = part @ factors  # less the squared length of the row
        distance += squares
        row = np.arange(len(part))
        first = distance.argmin(1)
        smallest = distance[row, first]
        error = gram_error(width, length.astype(np.float64), longest) + width * np.finfo(np.float32).tiny
        limit = smallest + 2 * error  # both distances err
        distance[row, first] = np.inf
        unsure = np.flatnonzero(~(distance.min(1) > limit))
        if len(unsure):
            distance[row, first] = smallest
            near = ~(distance[unsure] > limit[unsure, None])
            first[unsure] = _decide(x, rows[block][unsure], centroids, *np.nonzero(near))
        found[block] = first
    return found


def _decide(x: np.ndarray, rows: np.ndarray, centroids: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """(u,) nearest centroid of the rows x[rows] among pairs (row, column) that are sorted, each row with a pair at least."""
    distance = exact_distance(x, rows[row], centroids, column)
    smallest = np.minimum.reduceat(distance, np.flatnonzero(np.diff(row, prepend=-1)))
    best = np.flatnonzero(distance == smallest[row])
    return column[best[np.flatnonzero(np.diff(row[best], prepend=-1))]]


def exact_distance(x: np.ndarray, rows: np.ndarray, centroids: np.ndarray, index: np.ndarray) -> np.ndarray:
    """(r,) float64 squared distances of the rows x[rows] to centroids[index], by direct difference."""
    distance = np.empty(len(rows))
    for block in blocks(len(rows), x.shape[1]):
        distance[block] = squared_distance(np.take(x, rows[block], 0), np.take(centroids, index[block], 0))
    return distance


def nearest_again(
    x: np.ndarray, last: np.ndarray, before: np.ndarray, centroids: np.ndarray, beat: Callable[[], None] = lambda: None
) -> np.ndarray:
    """(n,) nearest centroid of all rows, where few centroids moved since the last answer; the same as ``nearest_of``.

    A centroid that stayed can only win if it has won before, or if the row's own centroid went away from it. So every other row
    is compared with the moved centroids only (Kaukoranta, Fränti and Nevalainen 2000).

    Args:
        x: (n, D) float32.
        last: (n,) the nearest of ``before``.
        before: (k, D) float32, the centroids then.
        centroids: (k, D) float32, those now.
        beat: called per block of rows.
    """
    moved = (before != centroids).any(1)
    every = np.arange(len(x))
    if not moved.any():
        return last
    if len(moved) - moved.sum() < WORTH_SKIPPING:
        return nearest_of(x, every, centroids, beat)
    distance = exact_distance(x, every, centroids, last)
    own = np.flatnonzero(moved[last])
    farther = np.zeros(len(x), bool)
    farther[own] = distance[own] > exact_distance(x, own, before, last[own])
    found = last.copy()
    some = np.flatnonzero(~farther)
    rival = np.flatnonzero(moved)[nearest_of(x, some, centroids[moved], beat)]
    rival_distance = exact_distance(x, some, centroids, rival)
    wins = (rival_distance < distance[some]) | ((rival_distance == distance[some]) & (rival < last[some]))
    found[some[wins]] = rival[wins]
    found[farther] = nearest_of(x, np.flatnonzero(farther), centroids, beat)
    return found
