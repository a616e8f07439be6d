"""Lloyd's k-means on the rows of this rank: per iteration one all-reduce whose size does not depend on the number of rows.

``device.py`` runs it on a GPU; the rest here is the CPU's. There the nearest centroids (``nearest.py``), the sums of the clusters
(``sums.py``) and the start (``centroids.py``) are exact, so the result is the same bit for bit for any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.clustering.centroids import KMEANS, KMeansOptions, KMeansResult, first_centroids, settled, split_empty
from dnc_dist.clustering.device import choose_backend, lloyd_on_device
from dnc_dist.clustering.features import Features
from dnc_dist.clustering.nearest import PROPOSALS, Propose, exact_distance, nearest_again, nearest_of
from dnc_dist.clustering.sums import GroupSums, energy, exponent_votes, highest_exponent, in_order


def kmeans(
    features: Features,
    k: int,
    *,
    seed: int,
    options: KMeansOptions = KMEANS,
    init: Tensor | None = None,
    restrict: Tensor | None = None,
    beat: Callable[[], None] = lambda: None,
) -> KMeansResult:
    """Collective. Cluster rows that are spread over ranks, until an update gains too little or ``options.iterations`` are done.

    Up to ``features.replicated_rows`` rows all ranks gather the rows and run the same k-means.

    Args:
        features: (n, D) local rows, on the device that is to compute.
        k: number of centroids.
        seed: equal on every rank; decides the start (k-means++ on a sample) and the splits of empty clusters.
        init: (k, D) warm start instead of k-means++.
        restrict: (n,) parent of each row in 0..k/2-1: the row competes between centroids 2p and 2p+1 only.
        beat: called again and again while this rank makes progress.

    Returns:
        The result for the local rows, on the CPU. Of two centroids that are equally near within float32 rounding, Triton may
        give either. A cluster may be empty if there are fewer distinct rows than clusters.

    Raises:
        InputError: fewer rows than centroids; triton where it does not run.
        RunError: rows that are not finite.
    """
    if features.total < k:
        raise InputError(
            f"{features.total} rows cannot be divided into {k} clusters; set division.num_learners to at most the number of rows"
        )
    backend = choose_backend(options.backend, features.local.device)
    lloyd = lloyd_on_device if backend == "triton" else partial(_lloyd, PROPOSALS[backend])
    if features.total > features.replicated_rows:
        return lloyd(features, k, seed, options, init, restrict, beat)
    restrict = None if restrict is None else features.gather(restrict)
    result = lloyd(features.replicated(), k, seed, options, init, restrict, beat)
    local = slice(features.start, features.start + len(features.local))
    return result._replace(assignment=result.assignment[local], distance=result.distance[local])


def nearest(x_local: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each row in float64, lowest index on a tie: (n, D), (k, D) -> (n,) int64."""
    x = _numpy(x_local)
    return torch.from_numpy(nearest_of(x, np.arange(len(x)), _numpy(centroids)))


def _numpy(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.detach().float().cpu().numpy())


def _lloyd(
    propose: Propose,
    features: Features,
    k: int,
    seed: int,
    options: KMeansOptions,
    init: Tensor | None,
    restrict: Tensor | None,
    beat: Callable[[], None],
) -> KMeansResult:
    x, all_reduce = _numpy(features.local), features.all_reduce
    parent = np.zeros(len(x), np.int64) if restrict is None else restrict.cpu().numpy().astype(np.int64)
    parents = 1 if restrict is None else k // 2
    largest = float(torch.linalg.vector_norm(torch.from_numpy(x), torch.inf)) if x.size else 0.0
    broken = 0 if math.isfinite(largest) else int((~np.isfinite(x).all(1)).sum())
    head = np.concatenate([np.bincount(parent, minlength=parents), [broken], exponent_votes(largest)])
    head = all_reduce(torch.from_numpy(head)).numpy()
    if head[parents]:
        raise RunError(f"{head[parents]} rows hold values that are not finite, so the model has diverged; lower optim.lr")
    rows_of_parent, exponent = head[:parents], highest_exponent(head[parents + 1 :])
    if init is None:
        features = features._replace(local=torch.from_numpy(x))
        centroids = first_centroids(features, parent, rows_of_parent, k // parents, seed, beat).numpy()
    else:
        centroids = _numpy(init).copy()
    members = [np.flatnonzero(parent == p) for p in range(parents)] if parents > 1 else [np.arange(len(x))]
    own_energy, sums = energy(x, exponent, features.total), GroupSums(x, k, exponent, features.total)
    assignment = np.full(len(x), -1)
    last, objective, splits = centroids, math.nan, 0
    for iteration in range(options.iterations + 1):
        beat()
        previous = assignment
        assignment = _assign(propose, x, members, centroids, None if iteration == 0 else (previous, last), beat)
        moved = sums.move(previous, assignment)
        packed = np.concatenate([sums.values.ravel(), np.bincount(assignment, minlength=k), [own_energy, moved]])
        packed = all_reduce(torch.from_numpy(packed)).numpy()
        total, counts = packed[: -2 - k].reshape(sums.values.shape), packed[-2 - k : -2]
        c = centroids.astype(np.float64)
        # The sum of squared distances follows from the sums: no pass over the rows, and no float32 in it.
        before, objective = objective, max(0.0, float(packed[-2]) - in_order(c * (2 * total - counts[:, None] * c)))
        if packed[-1] == 0 or settled(before, objective, options.tolerance) or iteration == options.iterations:
            break
        last, centroids = centroids, np.where(counts[:, None] > 0, total / np.maximum(counts, 1)[:, None], c).astype(np.float32)
        if split := split_empty(centroids, counts.astype(np.int64), rows_of_parent, seed, iteration):
            splits, objective = splits + split, math.nan
    return KMeansResult(
        torch.from_numpy(assignment),
        torch.from_numpy(exact_distance(x, np.arange(len(x)), centroids, assignment).astype(np.float32)),
        torch.from_numpy(centroids),
        objective,
        iteration,
        splits,
    )


def _assign(
    propose: Propose,
    x: np.ndarray,
    members: list[np.ndarray],
    centroids: np.ndarray,
    before: tuple[np.ndarray, np.ndarray] | None,
    beat: Callable[[], None],
) -> np.ndarray:
    """(n,) nearest centroid of each row among those of its parent.

    Args:
        members: the rows of each parent.
        before: the assignment of the last iteration, and its centroids.
    """
    if len(members) == 1 and before is not None:
        return nearest_again(x, *before, centroids, beat, propose)
    children = len(centroids) // len(members)
    found = np.empty(len(x), np.int64)
    for p, rows in enumerate(members):
        found[rows] = p * children + nearest_of(x, rows, centroids[p * children : (p + 1) * children], beat, propose)
    return found
