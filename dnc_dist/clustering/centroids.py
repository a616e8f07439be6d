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

SAMPLE_ROWS = 65_536
SAMPLE_ROWS_PER_CENTROID = 256
WORK_ELEMENTS = 1 << 21
SPLIT_TRIES = 10_000
SPLIT_PERTURBATION = 1 / 1024

Backend = Literal["auto", "triton", "faiss"]


@dataclass(frozen=True)
class KMeansOptions:
    """How a k-means runs."""

    iterations: int = 100
    """Updates of the centroids, at most."""
    backend: Backend = "auto"
    """``triton`` on the device of the features, or ``faiss`` on the CPU; ``auto`` is triton where it serves a GPU."""


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
    """Collective. (k, D) k-means++ (Arthur and Vassilvitskii 2007) per parent on a sample shared by all ranks; a beat per centroid."""
    x, gather = features.local, features.gather
    parents = len(rows_of_parent)
    quota = max(SAMPLE_ROWS_PER_CENTROID * children, SAMPLE_ROWS // parents)
    chosen = _uniform(seed, features.start, len(x)) < (quota / np.maximum(rows_of_parent, 1))[parent]
    taken = torch.from_numpy(np.flatnonzero(chosen)).to(x.device)
    sample = gather(x[taken]).cpu().numpy()
    sample_parent = gather(torch.from_numpy(parent[chosen]).to(x.device)).cpu().numpy()
    centroids = np.zeros((parents * children, x.shape[1]), np.float32)
    for p in range(parents):
        points = sample if parents == 1 else sample[sample_parent == p]
        if len(points):
            centroids[p * children : (p + 1) * children] = _plus_plus(points, children, numpy_generator(seed, "k-means++", p), beat)
    return centroids


def _plus_plus(x: np.ndarray, k: int, random: np.random.Generator, beat: Callable[[], None]) -> np.ndarray:
    step = max(1, WORK_ELEMENTS // x.shape[1])
    chosen = [int(random.integers(len(x)))]
    distance = np.full(len(x), np.inf)
    while len(chosen) < k:
        beat()
        for at in range(0, len(x), step):
            block = slice(at, at + step)
            np.minimum(distance[block], squared_distance(x[block], x[chosen[-1]]), out=distance[block])
        mass = np.cumsum(distance)
        point = random.random() * mass[-1]
        # With no distance left (fewer distinct rows than centroids) any row does: its cluster stays empty or is split.
        chosen.append(min(int(np.searchsorted(mass, point, side="right")), len(x) - 1))
    return x[chosen]


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
