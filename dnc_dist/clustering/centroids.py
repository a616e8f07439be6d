"""What all backends of k-means share: options, result, where it begins, and what becomes of empty clusters.

Both decisions fall on the host, in the same way on every rank; the distances that the first needs are taken where the rows are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnc_dist.base.exact import squared_length
from dnc_dist.base.rng import numpy_generator, seed_for
from dnc_dist.clustering.features import Features
from dnc_dist.clustering.sums import BLOCK_ELEMENTS, blocks

SAMPLE_ROWS_PER_CENTROID = 256
SAMPLE_ELEMENTS, DEVICE_ELEMENTS = 1 << 21, 1 << 24
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
) -> Tensor:
    """Collective. (k, D) k-means++ (Arthur and Vassilvitskii 2007) per parent on a sample shared by all ranks; beats while it runs.

    It is computed where the features are.
    """
    x, gather = features.local, features.gather
    parents = len(rows_of_parent)
    quota = SAMPLE_ROWS_PER_CENTROID * children
    chosen = _uniform(seed, features.start, len(x)) < (quota / np.maximum(rows_of_parent, 1))[parent]
    sample = gather(_take(x, np.flatnonzero(chosen))).to(x.device)
    sample_parent = gather(torch.from_numpy(parent[chosen]).to(x.device)).cpu().numpy()
    centroids = x.new_zeros(parents * children, x.shape[1])
    for p in range(parents):
        points = sample if parents == 1 else _take(sample, np.flatnonzero(sample_parent == p))
        if len(points):
            centroids[p * children : (p + 1) * children] = plus_plus(points, children, numpy_generator(seed, "k-means++", p), beat)
    return centroids


def _take(x: Tensor, rows: np.ndarray | list[int]) -> Tensor:
    return x[torch.as_tensor(rows, device=x.device)]


def plus_plus(x: Tensor, k: int, random: np.random.Generator, beat: Callable[[], None] = lambda: None) -> Tensor:
    """(k, D) rows of x (n, D): every one drawn with a probability proportional to its squared distance to those before it.

    Many are drawn at a time, by their distances before the round, and kept with the share that is left of the distance when those
    that the round has kept are counted, too: by rejection sampling that is the same distribution (Cohen-Addad et al. 2020).
    Distances are those of rows on a grid of ``GRID_BITS`` bits. They are integers, products of rows are exact in float32 and their
    sums over rows in float64, so that all processors and GPUs draw the same. The host reads twice a round what a GPU found.
    """
    dtype, elements = _work(x.device)
    pieces = blocks(len(x), x.shape[1], elements)
    chosen = [int(random.integers(len(x)))]
    points = on_grid(x, chosen[0])
    squares = torch.cat([points[block].square().sum(1) for block in pieces])
    distance = squares.double()  # the first one is the origin of the grid
    while len(chosen) < k:
        mass = distance.cumsum(0)
        total = float(mass[-1])
        if total == 0:  # no row is left that is no centroid: any will do, its cluster stays empty or is split
            chosen += random.integers(len(x), size=k - len(chosen)).tolist()
            break
        tries = min(len(chosen), DRAWN_AT_ONCE)
        aim = torch.from_numpy(random.random(tries) * total).to(x.device)
        drawn = torch.searchsorted(mass, aim, right=True).clamp_(max=len(x) - 1)
        some, lengths = points[drawn].to(dtype), squares[drawn].double()
        between = lengths[:, None] + lengths - 2 * (some @ some.T)
        found = torch.cat([drawn.double()[None], distance[drawn][None], between]).cpu().numpy()
        rows, left, between_rows = found[0].astype(np.int64), found[1], found[2:]
        threshold = random.random(tries) * left
        kept: list[int] = []
        for number in range(tries):
            if threshold[number] < left[number] and len(chosen) + len(kept) < k:
                kept.append(int(rows[number]))
                np.minimum(left, between_rows[number], out=left)
        factors, offsets = -2 * _take(points, kept).to(dtype).T, _take(squares, kept)
        for block in pieces:
            beat()
            nearest = (points[block].to(dtype) @ factors + offsets).amin(1).double() + squares[block]
            torch.minimum(distance[block], nearest, out=distance[block])
        chosen += kept
    return _take(x, chosen)


def _work(device: torch.device) -> tuple[torch.dtype, int]:
    """In what to take exact products, and how many elements at a time: what a processor's cache holds, what fills a GPU.

    A GPU may have been told to shorten the factors of float32 products (tf32).
    """
    return (torch.float32, SAMPLE_ELEMENTS) if device.type == "cpu" else (torch.float64, DEVICE_ELEMENTS)


def on_grid(x: Tensor, origin: int) -> Tensor:
    """(n, D) float32 integers, x less its row ``origin`` to ``GRID_BITS`` bits.

    Rows are then about 2^GRID_BITS long at most, so a sum of products of two rows stays below 2^24, the integers of float32.
    """
    middle, elements = x[origin].double(), BLOCK_ELEMENTS if x.device.type == "cpu" else DEVICE_ELEMENTS
    largest = [squared_length(x[block].double() - middle).max() for block in blocks(len(x), x.shape[1], elements)]
    points = x - x[origin]
    points *= 2.0 ** (GRID_BITS - math.frexp(math.sqrt(float(torch.stack(largest).max())))[1])
    return points.round_()


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
