"""The next division from features: k-means with trials, match, split (TPAMI 2021, section 3; published code: hierarchical "top_bot")."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dnc_dist.base.exact import nmi, squared_distance
from dnc_dist.base.rng import seed_for
from dnc_dist.clustering.centroids import KMeansOptions
from dnc_dist.clustering.device import choose_backend
from dnc_dist.clustering.division import MIN_CLASSES, Division, check_num_learners, make_division, match, whole
from dnc_dist.clustering.features import Features
from dnc_dist.clustering.groups import GroupRules, class_groups
from dnc_dist.clustering.kmeans import kmeans
from dnc_dist.clustering.repair import class_sizes, repair
from dnc_dist.processes import distributed

Mode = Literal["hierarchical", "flat"]
Start = Literal["k-means++", "previous"]


@dataclass(frozen=True)
class DivisionRules:
    """How a training set is divided."""

    num_learners: int
    """Final number of learners K; in hierarchical mode a power of two."""
    mode: Mode = "hierarchical"
    """``flat``: K learners from the first division on; ``hierarchical``: one at the first, then twice as many each time."""
    seed: int = 0
    """Of every k-means; equal on every rank."""
    start: Start = "k-means++"
    """Of the first k-means; ``previous`` begins at the previous division's centroids, so that learners keep more of their rows."""
    trials: int = 30
    """k-means runs per level until every cluster is trainable."""
    kmeans: KMeansOptions = field(default_factory=KMeansOptions)
    """Of every k-means."""
    groups: GroupRules | None = None
    """Batches are made of groups of classes; learners then take whole classes. None: of a learner's classes at random."""

    def level(self, previous: Division | None) -> int:
        """Number of learners of the division that follows ``previous``."""
        if self.mode == "flat":
            return self.num_learners
        return 1 if previous is None else min(2 * previous.num_learners, self.num_learners)


def divide(features: Features, labels: np.ndarray, rules: DivisionRules, *, epoch: int, previous: Division | None = None) -> Division:
    """Collective. Cluster, match to the previous division, and (hierarchical) split every cluster in two until K learners exist.

    A k-means is repeated with other seeds until every cluster has two trainable classes (four if it will be split now);
    after ``rules.trials`` runs, clusters without are dissolved into their nearest neighbour and re-formed from the classes of a
    large one, so that every learner can train. Children of cluster c are 2c and 2c + 1. The result is equal bit for bit for any
    number of ranks; with Triton: of equal GPUs, and up to ``features.replicated_rows`` rows.

    With ``rules.groups`` every row stands where its class's mean is. So a class is never cut, and only rows are left out whose class
    has no other row in the whole set; the division then holds groups of close classes, each within one learner.

    Args:
        features: L2-normalised features of all rows.
        labels: (N,) labels of all rows.
        rules: how to divide.
        epoch: when; kept in the division.
        previous: the last division, whose number of learners is the current one; None at the first.

    Returns:
        The same division on every rank.

    Raises:
        InputError: too few classes for K learners, fewer rows than learners, or a k-means backend that does not run here.
        RunError: features that are not finite.
    """
    check_num_learners(labels, rules.num_learners)
    if rules.groups is None:
        return _learners(features, labels, rules, epoch, previous)
    classes, class_of_row = np.unique(labels, return_inverse=True)
    means = _unit(features.means(class_of_row, len(classes)))
    division = _learners(features.replaced(means, class_of_row), labels, rules, epoch, previous)
    learner_of_class = np.full(len(classes), -1)
    learner_of_class[class_of_row] = division.learner_of
    # Rows that are equal have the same nearest centroid.
    assert (learner_of_class[class_of_row] == division.learner_of).all()
    groups = distributed.on_main(class_groups, means, learner_of_class, rules.groups)
    return replace(division, groups=np.where(groups >= 0, classes[groups], -1).astype(np.int32))


def _unit(means: np.ndarray) -> np.ndarray:
    """Means (C, F) float64 with the length 1, but for those of length 0, in float32."""
    length = np.sqrt(squared_distance(means, np.zeros(1)))
    return (means / np.where(length > 0, length, 1.0)[:, None]).astype(np.float32)


def _learners(features: Features, labels: np.ndarray, rules: DivisionRules, epoch: int, previous: Division | None) -> Division:
    """Collective. The learners of all rows."""
    level = rules.level(previous)
    if level == 1:
        return whole(labels, epoch=epoch)
    split = previous is not None and rules.mode == "hierarchical" and level > previous.num_learners
    found = level // 2 if split else level
    trials = _Trials(features, labels, rules)
    cluster = np.zeros(len(labels), np.int64)
    if found > 1:
        init = torch.from_numpy(previous.centroids) if previous is not None and rules.start == "previous" else None
        cluster = trials.clusters(found, init, min_classes=2 * MIN_CLASSES if split else MIN_CLASSES)
    matched_share, agreement = 1.0, 1.0
    if previous is not None:
        cluster = match(previous.learner_of, cluster, found)
        known = previous.learner_of >= 0
        matched_share = float((cluster == previous.learner_of)[known].mean())
        agreement = nmi(previous.learner_of[known], cluster[known])
    if split:
        cluster = trials.children(cluster, level)
    centroids = features.means(cluster, level)
    result = replace(
        make_division(cluster, labels, level, centroids.astype(np.float32), epoch),
        rejoined=trials.rejoined,
        trials=trials.run,
        objective=features.scatter_around(cluster, centroids),
        matched_share=matched_share,
        nmi_to_previous=agreement,
    )
    # Equal already, unless the ranks' processors round differently: then rank 0 decides.
    return distributed.broadcast_object(result)


class _Trials:
    """The k-means runs of one division, and what they report."""

    def __init__(self, features: Features, labels: np.ndarray, rules: DivisionRules) -> None:
        self.features, self.labels, self.rules = features, labels, rules
        # The same seed in every epoch, as the published implementation: features that hardly moved give the same clusters.
        self.seed = seed_for(rules.seed, "division")
        backend = choose_backend(rules.kmeans.backend, features.device)
        self.device = features.device if backend == "triton" else torch.device("cpu")
        self.options = replace(rules.kmeans, backend=backend)
        self.run, self.rejoined = 0, 0

    def clusters(self, k: int, init: Tensor | None, min_classes: int) -> np.ndarray:
        """Collective. (N,) clusters below k, each with ``min_classes`` trainable classes; ``init`` (k, F) starts the first trial."""
        best: tuple[int, float] | None = None
        for trial in range(self.rules.trials):
            cluster, centroids, objective = self._kmeans(self.features, k, init=init if trial == 0 else None)
            good = int((class_sizes(cluster, self.labels).trainable(k) >= min_classes).sum())
            if best is None or (good, -objective) > best:
                best, found, found_centroids = (good, -objective), cluster, centroids
            if good == k:
                break
        return self._repair(self.features, self.labels, found, found_centroids, k, min_classes)

    def children(self, parent: np.ndarray, k: int) -> np.ndarray:
        """Collective. (N,) children below k, 2c and 2c + 1 of every parent c; each parent keeps its first trial that can be trained."""
        cluster = np.full(len(parent), -1, np.int64)
        waiting = np.arange(k // 2)
        for trial in range(self.rules.trials):
            inside = np.isin(parent, waiting)
            features, labels = self.features.select(inside), self.labels[inside]
            child, centroids, _ = self._kmeans(features, 2 * len(waiting), parent=np.searchsorted(waiting, parent[inside]))
            classes = class_sizes(child, labels).trainable(2 * len(waiting))
            good = np.minimum(classes[0::2], classes[1::2]) >= MIN_CLASSES
            if trial == self.rules.trials - 1:
                child = self._repair_pairs(features, labels, child, centroids, np.flatnonzero(~good))
                good[:] = True
            done = good[child // 2]
            cluster[np.flatnonzero(inside)[done]] = 2 * waiting[child[done] // 2] + child[done] % 2
            waiting = waiting[~good]
            if not len(waiting):
                break
        return cluster

    def _repair_pairs(
        self, features: Features, labels: np.ndarray, child: np.ndarray, centroids: Tensor, parents: np.ndarray
    ) -> np.ndarray:
        child = child.copy()
        for p in parents:
            inside = child // 2 == p
            pair = centroids[2 * p : 2 * p + 2]
            child[inside] = 2 * p + self._repair(features.select(inside), labels[inside], child[inside] % 2, pair, 2, MIN_CLASSES)
        return child

    def _repair(
        self, features: Features, labels: np.ndarray, cluster: np.ndarray, centroids: Tensor, k: int, min_classes: int
    ) -> np.ndarray:
        repaired = repair(features, labels, cluster, centroids, k, min_classes)
        self.rejoined += int((repaired != cluster).sum())
        return repaired

    def _kmeans(
        self, features: Features, k: int, *, init: Tensor | None = None, parent: np.ndarray | None = None
    ) -> tuple[np.ndarray, Tensor, float]:
        """Collective. One more trial: (M,) clusters of all rows, (k, F) centroids, objective."""
        result = kmeans(
            features._replace(local=features.local.to(self.device)),
            k,
            seed=seed_for(self.seed, "trial", self.run),
            options=self.options,
            init=init,
            restrict=None if parent is None else torch.from_numpy(features.mine(parent)),
        )
        self.run += 1
        return features.gather_numbers(result.assignment, k), result.centroids, result.objective
