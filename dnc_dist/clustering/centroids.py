"""What all backends of k-means share: options, result, where it begins, and what becomes of empty clusters.

Both decisions fall on the host, in the same way on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnc_dist.base.exact import squared_distance
from dnc_dist.base.rng import numpy_generator, seed_for
from dnc_dist.clustering.features import Features
from dnc_dist.clustering.sums import blocks

SAMPLE_ROWS_PER_CENTROID = 256
SAMPLE_BLOCK = 1024
DRAWN_AT_ONCE = 256
GRID_BITS = 11
SPLIT_TRIES = 10_000
SPLIT_PERTURBATION = 1 / 1024

Backend = Literal["auto", "triton", "faiss", "numpy"]


@dataclass(frozen=True)
class KMeansOptions:
    """How a k-means runs."""

    iterations: int = 100
    """Updates of the centroids, at most."""
    backend: Backend = "auto"
    """``triton`` on the device of the features; ``faiss`` or ``numpy`` on the CPU; ``auto``: triton where it serves a GPU, else numpy."""
    tolerance: float = 1e-4
    """Stop when an update lowers the objective by no more than this share of it; 0: only when nothing is gained."""


KMEANS = KMeansOptions()
"""The defaults."""


class KMeansResult(NamedTuple):
    """The clusters of the local rows; ``assignment`` is the argmin for exactly these ``centroids``."""

    assignment: Tensor  # (n,) int64
    distance: Tensor  # (n,) float32, squared
    centroids: Tensor  # (k, D) float32
    objective: float  # sum of squared distances over all ranks
    iterations: int  # updates of the centroids
    splits: int  # empty clusters that were given half of another one


def _uniform(seed: int, start: int, n: int) -> np.ndarray:
    """(n,) uniform numbers of the rows from place ``start`` on: a row's number depends on its place only."""
    philox = np.random.Philox(seed_for(seed, "k-means sample")).advance(start // 4)
    return np.random.Generator(philox).random(n + start % 4)[start % 4 :]


def first_centroids(
    features: Features,
    parent: np.ndarray,
    rows_of_parent: np.ndarray,
    children: int,
    seed: int,
    beat: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Collective. (k, D) k-means++ (Arthur and Vassilvitskii 2007) per parent on a sample shared by all ranks; beats while it runs."""
    x, gather = features.local, features.gather
    parents = len(rows_of_parent)
    quota = SAMPLE_ROWS_PER_CENTROID * children
    chosen = _uniform(seed, features.start, len(x)) < (quota / np.maximum(rows_of_parent, 1))[parent]
    taken = torch.from_numpy(np.flatnonzero(chosen)).to(x.device)
    sample = gather(x[taken]).cpu().numpy()
    sample_parent = gather(torch.from_numpy(parent[chosen]).to(x.device)).cpu().numpy()
    centroids = np.zeros((parents * children, x.shape[1]), np.float32)
    for p in range(parents):
        points = sample if parents == 1 else sample[sample_parent == p]
        if len(points):
            centroids[p * children : (p + 1) * children] = plus_plus(points, children, numpy_generator(seed, "k-means++", p), beat)
    return centroids


def plus_plus(x: np.ndarray, k: int, random: np.random.Generator, beat: Callable[[], None] = lambda: None) -> np.ndarray:
    """(k, D) rows of x (n, D): every one drawn with a probability proportional to its squared distance to those before it.

    Many are drawn at a time, by their distances before the round, and kept with the share that is left of the distance when those
    that the round has kept are counted, too: by rejection sampling that is the same distribution (Cohen-Addad et al. 2020).
    Distances are those of rows on a grid of ``GRID_BITS`` bits: float32 products of these are exact, so that all processors draw
    the same.
    """
    chosen = [int(random.integers(len(x)))]
    points = on_grid(x, chosen[0])
    squares = np.einsum("ij,ij->i", points, points)
    distance = squares.astype(np.float64)  # the first one is the origin of the grid
    while len(chosen) < k:
        mass = np.cumsum(distance)
        if mass[-1] == 0:  # no row is left that is no centroid: any will do, its cluster stays empty or is split
            chosen += random.integers(len(x), size=k - len(chosen)).tolist()
            break
        tries = min(len(chosen), DRAWN_AT_ONCE)
        drawn = np.minimum(np.searchsorted(mass, random.random(tries) * mass[-1], side="right"), len(x) - 1)
        threshold = random.random(tries) * distance[drawn]
        left, kept = distance[drawn], np.empty(0, np.int64)
        between = squares[drawn][:, None] + squares[drawn].astype(np.float64) - 2 * (points[drawn] @ points[drawn].T)
        for number in range(tries):
            if threshold[number] < left[number] and len(chosen) + len(kept) < k:
                kept = np.append(kept, drawn[number])
                np.minimum(left, between[number], out=left)
        factors, offsets = np.ascontiguousarray(-2 * points[kept].T), squares[kept]
        for at in range(0, len(x), SAMPLE_BLOCK):
            beat()
            block = slice(at, at + SAMPLE_BLOCK)
            nearest = (points[block] @ factors + offsets).min(1).astype(np.float64) + squares[block]
            np.minimum(distance[block], nearest, out=distance[block])
        chosen += kept.tolist()
    return x[chosen]


def on_grid(x: np.ndarray, origin: int) -> np.ndarray:
    """(n, D) float32 integers, x less its row ``origin`` to ``GRID_BITS`` bits.

    Rows are then about 2^GRID_BITS long at most, so a sum of products of two rows stays below 2^24, the integers of float32.
    """
    largest = np.sqrt(max(float(squared_distance(x[block], x[origin]).max()) for block in blocks(len(x), x.shape[1])))
    points = x - x[origin]
    points *= np.float32(2.0 ** (GRID_BITS - np.frexp(largest)[1]))
    return np.rint(points, out=points)


def settled(before: float, now: float, tolerance: float) -> bool:
    """Whether an update that took the objective from ``before`` (NaN: it cannot be compared) to ``now`` gained too little to go on."""
    return before - now <= tolerance * before


def split_empty(centroids: np.ndarray, counts: np.ndarray, rows_of_parent: np.ndarray, seed: int, iteration: int) -> int:
    """Give every empty cluster half of another one, in place, as FAISS does (``Clustering.cpp``, ``split_clusters``).

    The donor is found by walking round the clusters and accepting j with probability (n_j - 1) / (n - k); both get its
    centroid, perturbed by 1/1024 in opposite directions. With parents, children take from their sibling only.
    """
    if counts.all():
        return 0
    children = len(counts) // len(rows_of_parent)
    random = numpy_generator(seed, "split", iteration)
    splits = 0
    for empty in np.flatnonzero(counts == 0):
        parent = int(empty) // children
        siblings = np.arange(parent * children, (parent + 1) * children)
        if counts[siblings].max() < 2:
            continue
        accept = (counts[siblings] - 1) / max(1, rows_of_parent[parent] - children)
        tries = random.random(SPLIT_TRIES) < np.resize(accept, SPLIT_TRIES)
        donor = siblings[int(tries.argmax()) % children] if tries.any() else siblings[counts[siblings].argmax()]
        sign = np.where(np.arange(centroids.shape[1]) % 2 == 0, SPLIT_PERTURBATION, -SPLIT_PERTURBATION).astype(np.float32)
        centroids[empty] = centroids[donor] * (1 + sign)
        centroids[donor] *= 1 - sign
        counts[empty] = counts[donor] // 2
        counts[donor] -= counts[empty]
        splits += 1
    return splits
