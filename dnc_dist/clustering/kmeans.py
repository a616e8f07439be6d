"""Lloyd's k-means on the rows of this rank: per iteration one all-reduce whose size does not depend on the number of rows.

``device.py`` runs it on a GPU; the rest here is the FAISS path on the CPU. There the nearest centroid of a row is the argmin
of float64 distances, the lowest index winning: FAISS finds the two nearest in float32, and rows whose two distances are
closer than float32 can tell are decided again in float64. So neither BLAS, threads nor block shapes show in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import faiss
import numpy as np
import torch
from torch import Tensor

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.base.exact import gram_error, squared_distance
from dnc_dist.clustering.centroids import KMEANS, WORK_ELEMENTS, KMeansOptions, KMeansResult, first_centroids, split_empty
from dnc_dist.clustering.device import choose_backend, lloyd_on_device
from dnc_dist.clustering.features import SUM_BLOCK, Features, sum_by_group


class _Segment(NamedTuple):
    """Rows ``start:stop`` compete for the centroids ``first:last`` only."""

    start: int
    stop: int
    first: int
    last: int


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
    """Collective. Cluster rows that are spread over ranks, until no row moves or ``options.iterations`` updates are done.

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
    lloyd = lloyd_on_device if choose_backend(options.backend, features.local.device) == "triton" else _lloyd
    if features.total > features.replicated_rows:
        return lloyd(features, k, seed, options.iterations, init, restrict, beat)
    restrict = None if restrict is None else features.gather(restrict)
    result = lloyd(features.replicated(), k, seed, options.iterations, init, restrict, beat)
    local = slice(features.start, features.start + len(features.local))
    return result._replace(assignment=result.assignment[local], distance=result.distance[local])


def nearest(x_local: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each row in float64, lowest index on a tie: (n, D), (k, D) -> (n,) int64."""
    x = _numpy(x_local)
    return torch.from_numpy(_assign(x, _norms(x), _numpy(centroids), [_Segment(0, len(x), 0, centroids.shape[0])]))


def _numpy(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.detach().float().cpu().numpy())


def _norms(x: np.ndarray) -> np.ndarray:
    """(n,) float64 lengths of the rows, in blocks."""
    blocks = [np.sqrt(squared_distance(x[at : at + SUM_BLOCK], np.zeros(1, np.float32))) for at in range(0, len(x), SUM_BLOCK)]
    return np.concatenate(blocks) if blocks else np.empty(0)


def _lloyd(
    features: Features,
    k: int,
    seed: int,
    iterations: int,
    init: Tensor | None,
    restrict: Tensor | None,
    beat: Callable[[], None],
) -> KMeansResult:
    x, all_reduce = _numpy(features.local), features.all_reduce
    norms = _norms(x)
    parent = np.zeros(len(x), np.int64) if restrict is None else restrict.cpu().numpy().astype(np.int64)
    parents = 1 if restrict is None else k // 2
    children = k // parents
    head = np.append(np.bincount(parent, minlength=parents), (~np.isfinite(norms)).sum())
    head = all_reduce(torch.from_numpy(head)).numpy()
    if head[-1]:
        raise RunError(f"{head[-1]} rows hold values that are not finite, so the model has diverged; lower optim.lr")
    rows_of_parent = head[:-1]
    if init is None:
        centroids = first_centroids(features._replace(local=torch.from_numpy(x)), parent, rows_of_parent, children, seed, beat)
    else:
        centroids = _numpy(init).copy()
    order = np.argsort(parent, kind="stable")
    if restrict is not None:
        x, norms = x[order], norms[order]
    ends = np.cumsum(np.bincount(parent, minlength=parents))
    segments = [
        _Segment(int(end - n), int(end), p * children, (p + 1) * children)
        for p, (end, n) in enumerate(zip(ends, np.diff(ends, prepend=0), strict=True))
    ]
    energy = float(np.square(norms).sum())
    assignment = np.full(len(x), -1)
    splits = 0
    for iteration in range(iterations + 1):
        beat()
        previous, assignment = assignment, _assign(x, norms, centroids, segments)
        sums, counts = sum_by_group(x, assignment, k), np.bincount(assignment, minlength=k)
        c = centroids.astype(np.float64)
        # The sum of squared distances follows from the sums: no pass over the rows, and no float32 in it.
        objective = energy - 2 * (sums * c).sum() + (counts * np.square(c).sum(1)).sum()
        packed = np.concatenate([sums.ravel(), counts, [objective, (previous != assignment).sum()]])
        packed = all_reduce(torch.from_numpy(packed)).numpy()
        if packed[-1] == 0 or iteration == iterations:
            break
        counts = packed[-2 - k : -2]
        means = packed[: -2 - k].reshape(sums.shape) / np.maximum(counts, 1)[:, None]
        centroids = np.where(counts[:, None] > 0, means, c).astype(np.float32)
        splits += split_empty(centroids, counts.astype(np.int64), rows_of_parent, seed, iteration)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    distance = np.empty(len(x), np.float32)
    for at in range(0, len(x), SUM_BLOCK):
        block = slice(at, at + SUM_BLOCK)
        distance[block] = squared_distance(x[block], centroids[assignment[block]])
    return KMeansResult(
        torch.from_numpy(assignment[inverse]),
        torch.from_numpy(distance[inverse]),
        torch.from_numpy(centroids),
        max(0.0, float(packed[-2])),
        iteration,
        splits,
    )


def _assign(x: np.ndarray, norms: np.ndarray, centroids: np.ndarray, segments: list[_Segment]) -> np.ndarray:
    """(n,) nearest centroid among those of the row's segment."""
    nearest_one = np.empty(len(x), np.int64)
    longest = np.sqrt(np.square(centroids.astype(np.float64)).sum(1))
    for start, stop, first, last in segments:
        nearest_one[start:stop] = first
        if last - first == 1 or stop == start:
            continue
        candidates = centroids[first:last]
        distance, index = faiss.knn(x[start:stop], candidates, 2)
        nearest_one[start:stop] += index[:, 0]
        unsure = distance[:, 1] - distance[:, 0] <= 2 * gram_error(x.shape[1], norms[start:stop], longest[first:last].max())
        doubtful = start + np.flatnonzero(unsure)
        step = max(1, WORK_ELEMENTS // candidates.size)
        for at in range(0, len(doubtful), step):
            block = doubtful[at : at + step]
            nearest_one[block] = first + squared_distance(x[block, None], candidates[None]).argmin(1)
    return nearest_one
