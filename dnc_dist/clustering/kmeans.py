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
from scipy.sparse import csr_matrix
from torch import Tensor

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.base.exact import gram_error, squared_distance
from dnc_dist.clustering.centroids import WORK_ELEMENTS, Collective, KMeansResult, first_centroids, split_empty
from dnc_dist.clustering.device import Backend, choose_backend, lloyd_on_device

REPLICATED_ROWS = 100_000
"""Up to so many rows every rank gathers all of them and runs the same k-means; its result is then equal bit for bit for any W."""

SUM_BLOCK = 8192


class _Segment(NamedTuple):
    """Rows ``start:stop`` compete for the centroids ``first:last`` only."""

    start: int
    stop: int
    first: int
    last: int


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def kmeans(
    x_local: Tensor,
    k: int,
    *,
    seed: int,
    iterations: int = 100,
    row_start: int = 0,
    num_rows: int | None = None,
    all_reduce: Collective = _alone,
    gather: Collective = _alone,
    init: Tensor | None = None,
    restrict: Tensor | None = None,
    replicated_rows: int = REPLICATED_ROWS,
    backend: Backend = "auto",
    beat: Callable[[], None] = lambda: None,
) -> KMeansResult:
    """Collective. Cluster rows that are spread over ranks, until no row moves or ``iterations`` updates are done.

    Args:
        x_local: (n, D) rows of this rank; n may be 0.
        k: number of centroids.
        seed: equal on every rank; decides the start (k-means++ on a sample) and the splits of empty clusters.
        row_start: global index of the first local row; ranks hold consecutive rows in rank order.
        num_rows: N, rows of all ranks; None: ``x_local`` holds all of them.
        all_reduce: sums a tensor over ranks.
        gather: concatenates rows of all ranks in rank order.
        init: (k, D) warm start instead of k-means++.
        restrict: (n,) parent of each row in 0..k/2-1: the row competes between centroids 2p and 2p+1 only.
        replicated_rows: up to so many rows all ranks gather the rows and run the same k-means.
        backend: ``triton`` on the device of ``x_local``, or ``faiss`` on the CPU; ``auto`` is triton where it serves a GPU.
        beat: called again and again while this rank makes progress.

    Returns:
        The result for the local rows, on the CPU. Of two centroids that are equally near within float32 rounding, Triton may
        give either. A cluster may be empty if there are fewer distinct rows than clusters.

    Raises:
        InputError: fewer rows than centroids; triton where it does not run.
        RunError: rows that are not finite.
    """
    total = x_local.shape[0] if num_rows is None else num_rows
    if total < k:
        raise InputError(f"{total} rows cannot be divided into {k} clusters; set division.num_learners to at most the number of rows")
    lloyd = lloyd_on_device if choose_backend(backend, x_local.device) == "triton" else _lloyd
    if total <= replicated_rows:
        n, device = x_local.shape[0], x_local.device
        x_local = gather(x_local).to(device)
        restrict = None if restrict is None else gather(restrict)
        result = lloyd(x_local, k, seed, iterations, 0, _alone, _alone, init, restrict, beat)
        local = slice(row_start, row_start + n)
        return result._replace(assignment=result.assignment[local], distance=result.distance[local])
    return lloyd(x_local, k, seed, iterations, row_start, all_reduce, gather, init, restrict, beat)


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
    x_local: Tensor,
    k: int,
    seed: int,
    iterations: int,
    row_start: int,
    all_reduce: Collective,
    gather: Collective,
    init: Tensor | None,
    restrict: Tensor | None,
    beat: Callable[[], None],
) -> KMeansResult:
    x = _numpy(x_local)
    norms = _norms(x)
    parent = np.zeros(len(x), np.int64) if restrict is None else restrict.cpu().numpy().astype(np.int64)
    parents = 1 if restrict is None else k // 2
    children = k // parents
    head = np.append(np.bincount(parent, minlength=parents), (~np.isfinite(norms)).sum())
    head = all_reduce(torch.from_numpy(head)).numpy()
    if head[-1]:
        raise RunError(f"{head[-1]} rows hold values that are not finite, so the model has diverged; lower optim.lr")
    rows_of_parent = head[:-1]
    warm = None if init is None else _numpy(init).copy()
    centroids = (
        first_centroids(torch.from_numpy(x), parent, rows_of_parent, children, seed, row_start, gather, beat) if warm is None else warm
    )
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
        rows = slice(at, at + SUM_BLOCK)
        distance[rows] = squared_distance(x[rows], centroids[assignment[rows]])
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
            rows = doubtful[at : at + step]
            nearest_one[rows] = first + squared_distance(x[rows, None], candidates[None]).argmin(1)
    return nearest_one


def sum_by_group(x: np.ndarray, group: np.ndarray, num_groups: int) -> np.ndarray:
    """(num_groups, D) float64 sums of the rows with each number, added row by row in fixed blocks."""
    sums = np.zeros((num_groups, x.shape[1]))
    for at in range(0, len(x), SUM_BLOCK):
        member = group[at : at + SUM_BLOCK]
        ends = np.cumsum(np.bincount(member, minlength=num_groups))
        one_hot = csr_matrix((np.ones(len(member)), np.argsort(member, kind="stable"), np.append(0, ends)), shape=(num_groups, len(member)))
        sums += one_hot @ x[at : at + SUM_BLOCK].astype(np.float64)
    return sums
