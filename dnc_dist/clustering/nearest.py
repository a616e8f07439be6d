"""The nearest centroid of each row on the CPU: the argmin of float64 distances, the lowest index winning.

FAISS or a float32 product proposes. Centroids whose float32 distances are closer to the smallest than float32 can tell are compared
again in float64, added in a fixed order. So neither who proposes, BLAS, threads nor block shapes show in the result.
"""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np

from dnc_dist.base.exact import FLOAT32_ROUNDING, gram_error, squared_distance
from dnc_dist.clustering.sums import blocks

PRODUCT_ELEMENTS = 1 << 22
PRODUCT_ROWS = 512
WORTH_SKIPPING = 512
"""So many centroids that stayed pay for the float64 distances that it takes to leave them out."""

Propose = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Rows (b, D), centroids (k, D) and their squared lengths (k,), all float32 -> by float32 distances the nearest centroid (b,) int64 of
each row, and by how much (b,) the next one is farther: too small or NaN where that is not known."""


def by_product(part: np.ndarray, centroids: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``Propose`` by a matrix product."""
    distance = _less_own_length(part, centroids, squares)
    row = np.arange(len(part))
    first = distance.argmin(1)
    smallest = distance[row, first]
    distance[row, first] = np.inf
    return first, distance.min(1) - smallest


def by_faiss(part: np.ndarray, centroids: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``Propose`` by FAISS."""
    distance, index = faiss.knn(part, centroids, 2)
    return index[:, 0].astype(np.int64), distance[:, 1] - distance[:, 0]


PROPOSALS: dict[str, Propose] = {"numpy": by_product, "faiss": by_faiss}


def _less_own_length(part: np.ndarray, centroids: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """(b, k) float32 squared distances, less the squared length of each row."""
    distance = part @ (-2 * centroids).T
    distance += squares
    return distance


def nearest_of(
    x: np.ndarray, rows: np.ndarray, centroids: np.ndarray, beat: Callable[[], None] = lambda: None, propose: Propose = by_product
) -> np.ndarray:
    """(r,) int64 nearest centroid of the rows x[rows].

    Args:
        x: (n, D) float32.
        rows: (r,) int64.
        centroids: (k, D) float32.
        beat: called per block of rows.
        propose: how; the result is the same.
    """
    found = np.zeros(len(rows), np.int64)
    if len(centroids) == 1:
        return found
    # Distances from a point amid the centroids: smaller numbers, smaller errors, also for rows that all point the same way.
    middle = centroids.mean(0)
    around = centroids - middle
    squares = np.square(around.astype(np.float64)).sum(1)
    longest = np.sqrt(squares.max())
    squares = squares.astype(np.float32)
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
        first, lead = propose(part, around, squares)
        error = gram_error(width, length.astype(np.float64), longest) + width * np.finfo(np.float32).tiny
        unsure = np.flatnonzero(~(lead > 2 * error))  # both distances err
        if len(unsure):
            distance = _less_own_length(part[unsure], around, squares)
            near = ~(distance > (distance.min(1) + 2 * error[unsure])[:, None])
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
    x: np.ndarray,
    last: np.ndarray,
    before: np.ndarray,
    centroids: np.ndarray,
    beat: Callable[[], None] = lambda: None,
    propose: Propose = by_product,
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
        return nearest_of(x, every, centroids, beat, propose)
    distance = exact_distance(x, every, centroids, last)
    own = np.flatnonzero(moved[last])
    farther = np.zeros(len(x), bool)
    farther[own] = distance[own] > exact_distance(x, own, before, last[own])
    found = last.copy()
    some = np.flatnonzero(~farther)
    rival = np.flatnonzero(moved)[nearest_of(x, some, centroids[moved], beat, propose)]
    rival_distance = exact_distance(x, some, centroids, rival)
    wins = (rival_distance < distance[some]) | ((rival_distance == distance[some]) & (rival < last[some]))
    found[some[wins]] = rival[wins]
    found[farther] = nearest_of(x, np.flatnonzero(farther), centroids, beat, propose)
    return found
