"""Clusters with too few classes to train on are dissolved, and new ones formed from the classes of large clusters."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnc_dist.clustering.features import Features
from dnc_dist.clustering.kmeans import nearest


class ClassSizes(NamedTuple):
    """How many rows each class has in each cluster, over the pairs that occur."""

    cluster: np.ndarray  # (pairs,)
    size: np.ndarray  # (pairs,)
    of_row: np.ndarray  # (N,) rows of the same class in the same cluster, the row itself included

    def trainable(self, num_clusters: int) -> np.ndarray:
        """(num_clusters,) classes with at least two rows in the cluster."""
        return np.bincount(self.cluster[self.size >= 2], minlength=num_clusters)


def class_sizes(cluster: np.ndarray, labels: np.ndarray) -> ClassSizes:
    """Count classes: cluster (N,) not negative, labels (N,) any integers."""
    classes, label = np.unique(labels, return_inverse=True)
    pair, inverse, count = np.unique(cluster.astype(np.int64) * len(classes) + label, return_inverse=True, return_counts=True)
    return ClassSizes(pair // max(1, len(classes)), count, count[inverse])


def repair(features: Features, labels: np.ndarray, cluster: np.ndarray, centroids: Tensor, k: int, min_classes: int) -> np.ndarray:
    """Collective. Clusters that all have ``min_classes`` trainable classes (two rows or more), changed only where needed.

    Rows of a cluster with fewer join the nearest centroid of a cluster with enough. The number thus freed goes to a part of
    the cluster with most classes, cut between classes. If that does not suffice, all rows are cut between classes.

    Args:
        labels: (N,) of all rows; at least ``k * min_classes`` classes must have two rows.
        cluster: (N,) numbers below k.
        centroids: (k, F).

    Returns:
        (N,) numbers below k.
    """
    classes = class_sizes(cluster, labels).trainable(k)
    good = classes >= min_classes
    if good.all():
        return cluster
    cluster = cluster.copy()
    if good.any():
        lost = ~good[cluster]
        joined = features.gather_numbers(nearest(features.select(lost).local, centroids[torch.from_numpy(good)]), k)
        cluster[lost] = np.flatnonzero(good)[joined]
        classes = class_sizes(cluster, labels).trainable(k)
    parts = good.astype(np.int64)
    while parts.sum() < k:
        largest = int(np.where(parts > 0, classes / (parts + 1), -1.0).argmax())
        if parts[largest] == 0 or classes[largest] < min_classes * (parts[largest] + 1):
            cluster[:] = 0
            parts = np.append(k, np.zeros(k - 1, np.int64))
            break
        parts[largest] += 1
    free = np.flatnonzero(parts == 0).tolist()
    for source in np.flatnonzero(parts > 1):
        numbers = [int(source), *(free.pop(0) for _ in range(parts[source] - 1))]
        _cut_between_classes(features, labels, cluster, numbers)
    return cluster


def _cut_between_classes(features: Features, labels: np.ndarray, cluster: np.ndarray, numbers: list[int]) -> None:
    """Collective. Spread the rows of cluster ``numbers[0]`` over ``numbers``, in place: classes stay whole, and every part
    gets its share of the trainable ones.

    Classes are ordered along the line between two class means that lie far apart.
    """
    if len(numbers) == 1:
        return
    inside = cluster == numbers[0]
    _, label, count = np.unique(labels[inside], return_inverse=True, return_counts=True)
    means = features.select(inside).means(label, len(count))
    one = means[np.square(means - means.mean(0)).sum(1).argmax()]
    other = means[np.square(means - one).sum(1).argmax()]
    order = np.argsort(((means - one) * (other - one)).sum(1), kind="stable")
    left_numbers = numbers[: len(numbers) // 2]
    trainable = np.cumsum(count[order] >= 2)
    left_share = trainable[-1] * len(left_numbers) // len(numbers)
    right = np.empty(len(count), bool)
    right[order] = trainable > left_share
    cluster[np.flatnonzero(inside)[right[label]]] = numbers[len(left_numbers)]
    _cut_between_classes(features, labels, cluster, left_numbers)
    _cut_between_classes(features, labels, cluster, numbers[len(left_numbers) :])
