"""The next division from features: k-means with trials, match, split (TPAMI 2021, section 3; published code: hierarchical "top_bot")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dnc_dist.base.exact import nmi
from dnc_dist.base.rng import seed_for
from dnc_dist.clustering.device import Backend, choose_backend
from dnc_dist.clustering.division import MIN_CLASSES, Division, check_num_learners, make_division, match, whole
from dnc_dist.clustering.kmeans import REPLICATED_ROWS, kmeans
from dnc_dist.clustering.repair import class_sizes, repair
from dnc_dist.clustering.rows import Rows, spread_rows
from dnc_dist.processes import distributed

TRIALS = 30


def divide(
    features_local: Tensor,
    labels: np.ndarray,
    *,
    row_start: int,
    target: int,
    epoch: int,
    mode: Literal["hierarchical", "flat"],
    seed: int,
    previous: Division | None,
    start: Literal["k-means++", "previous"] = "k-means++",
    iterations: int = 100,
    trials: int = TRIALS,
    replicated_rows: int = REPLICATED_ROWS,
    backend: Backend = "auto",
    vote: Callable[[], None] = lambda: None,
) -> Division:
    """Collective. Cluster, match to the previous division, and (hierarchical) split every cluster in two until ``target``.

    Flat mode has ``target`` learners from the first division on; hierarchical mode one, then twice the previous number.
    A k-means is repeated with other seeds until every cluster has two trainable classes (four if it will be split now);
    after ``trials`` runs, clusters without are dissolved into their nearest neighbour and re-formed from the classes of a
    large one, so that every learner can train. Children of cluster c are 2c and 2c + 1.

    Args:
        features_local: (n, F) L2-normalised features of this rank's rows; n may be 0.
        labels: (N,) labels of all rows.
        row_start: first global row of this rank; ranks hold consecutive rows in rank order.
        target: final number of learners K; in hierarchical mode a power of two.
        previous: the last division, whose number of learners is the current one; None at the first.
        start: of the first k-means; "previous" begins at the previous division's centroids, so learners keep more of their rows.
        iterations: of each k-means, at most.
        trials: k-means runs per level until every cluster is trainable.
        replicated_rows: up to so many rows the result is equal bit for bit for any number of ranks (with Triton: of equal GPUs).
        backend: of each k-means; ``auto`` is Triton where it serves this rank's device, else FAISS.
        vote: collective; called now and then while rows are spread over ranks, raises on every rank if the work is to be abandoned.

    Returns:
        The same division on every rank.

    Raises:
        InputError: too few classes for ``target`` learners, fewer rows than learners, or a backend that does not run here.
        RunError: features that are not finite.
    """
    check_num_learners(labels, target)
    current = 1 if previous is None else previous.num_learners
    level = target if mode == "flat" else current
    split = mode == "hierarchical" and previous is not None and level < target
    if level == 1 and not split:
        return whole(labels, epoch=epoch)
    rows = spread_rows(features_local, row_start, len(labels), replicated_rows, vote)
    # The same seed in every epoch, as the published implementation: features that hardly moved give the same clusters.
    divider = _Divider(rows, labels, seed_for(seed, "division"), iterations, trials, replicated_rows, backend)
    cluster = np.zeros(len(labels), np.int64)
    if level > 1:
        init = torch.from_numpy(previous.centroids) if previous is not None and start == "previous" else None
        cluster = divider.cluster(level, init, min_classes=2 * MIN_CLASSES if split else MIN_CLASSES)
    matched_share, agreement = 1.0, 1.0
    if previous is not None:
        cluster = match(previous.learner_of, cluster, level)
        known = previous.learner_of >= 0
        matched_share = float((cluster == previous.learner_of)[known].mean())
        agreement = nmi(previous.learner_of[known], cluster[known])
    if split:
        level *= 2
        cluster = divider.split(cluster, level)
    centroids = rows.means(cluster, level)
    result = replace(
        make_division(cluster, labels, level, centroids.astype(np.float32), epoch),
        rejoined=divider.rejoined,
        trials=divider.trials_run,
        objective=rows.scatter_around(cluster, centroids),
        matched_share=matched_share,
        nmi_to_previous=agreement,
    )
    # Equal already, unless the ranks' processors round differently: then rank 0 decides.
    return distributed.broadcast_object(result)


class _Divider:
    """The k-means runs of one division, and what they report."""

    def __init__(
        self, rows: Rows, labels: np.ndarray, seed: int, iterations: int, trials: int, replicated_rows: int, backend: Backend
    ) -> None:
        self.rows, self.labels, self.seed = rows, labels, seed
        self.iterations, self.trials, self.replicated_rows = iterations, trials, replicated_rows
        self.backend = choose_backend(backend, distributed.device())
        self.device = distributed.device() if self.backend == "triton" else torch.device("cpu")
        self.trials_run, self.rejoined = 0, 0

    def cluster(self, k: int, init: Tensor | None, min_classes: int) -> np.ndarray:
        """Collective. (N,) clusters below k, each with ``min_classes`` trainable classes; ``init`` (k, F) starts the first trial."""
        best: tuple[int, float] | None = None
        for trial in range(self.trials):
            cluster, centroids, objective = self._kmeans(self.rows, k, init=init if trial == 0 else None)
            good = int((class_sizes(cluster, self.labels).trainable(k) >= min_classes).sum())
            if best is None or (good, -objective) > best:
                best, found, found_centroids = (good, -objective), cluster, centroids
            if good == k:
                break
        return self._repair(self.rows, self.labels, found, found_centroids, k, min_classes)

    def split(self, parent: np.ndarray, k: int) -> np.ndarray:
        """Collective. (N,) children below k, 2c and 2c + 1 of every parent c; each parent keeps its first trial that can be trained."""
        cluster = np.full(len(parent), -1, np.int64)
        waiting = np.arange(k // 2)
        for trial in range(self.trials):
            inside = np.isin(parent, waiting)
            rows, labels = self.rows.select(inside), self.labels[inside]
            child, centroids, _ = self._kmeans(rows, 2 * len(waiting), parent=np.searchsorted(waiting, parent[inside]))
            classes = class_sizes(child, labels).trainable(2 * len(waiting))
            good = np.minimum(classes[0::2], classes[1::2]) >= MIN_CLASSES
            if trial == self.trials - 1:
                child = self._repair_pairs(rows, labels, child, centroids, np.flatnonzero(~good))
                good[:] = True
            done = good[child // 2]
            cluster[np.flatnonzero(inside)[done]] = 2 * waiting[child[done] // 2] + child[done] % 2
            waiting = waiting[~good]
            if not len(waiting):
                break
        return cluster

    def _repair_pairs(self, rows: Rows, labels: np.ndarray, child: np.ndarray, centroids: Tensor, parents: np.ndarray) -> np.ndarray:
        child = child.copy()
        for p in parents:
            inside = child // 2 == p
            pair = centroids[2 * p : 2 * p + 2]
            child[inside] = 2 * p + self._repair(rows.select(inside), labels[inside], child[inside] % 2, pair, 2, MIN_CLASSES)
        return child

    def _repair(self, rows: Rows, labels: np.ndarray, cluster: np.ndarray, centroids: Tensor, k: int, min_classes: int) -> np.ndarray:
        repaired = repair(rows, labels, cluster, centroids, k, min_classes)
        self.rejoined += int((repaired != cluster).sum())
        return repaired

    def _kmeans(
        self, rows: Rows, k: int, *, init: Tensor | None = None, parent: np.ndarray | None = None
    ) -> tuple[np.ndarray, Tensor, float]:
        """Collective. One more trial: (M,) clusters of all rows, (k, F) centroids, objective."""
        result = kmeans(
            rows.local.to(self.device),
            k,
            seed=seed_for(self.seed, "trial", self.trials_run),
            iterations=self.iterations,
            row_start=rows.start,
            num_rows=rows.total,
            all_reduce=rows.all_reduce,
            gather=rows.gather,
            init=init,
            restrict=None if parent is None else torch.from_numpy(rows.mine(parent)),
            replicated_rows=self.replicated_rows,
            backend=self.backend,
        )
        self.trials_run += 1
        return rows.gather_numbers(result.assignment, k), result.centroids, result.objective
