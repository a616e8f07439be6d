"""Groups of classes that lie close together: what a hard batch is made of, whichever learner trains on it.

Classes stand for their images here: a class is its mean feature, of unit length. Two kinds of groups:

- ``groups``: every class in exactly one group, all groups equally large but for one class (balanced k-means by repeated halving).
  Clusters of about a batch's size are what contextual document embeddings (arXiv 2410.02525) and B3 (NeurIPS 2025) train on.
- ``neighbours``: for each class the class itself and its nearest ones (graph sampling, CVPR 2022), so groups overlap.

The nearest classes may be the same thing under another name, or too hard to begin with: B3 passes over the nearest 30 to 70 ranks, and
BatchSampler (KDD 2023) found that batches of nearest neighbours alone hurt. ``skip_nearest`` passes over so many classes.

Means are rounded to a grid on which products in float32 are exact, so the groups do not depend on processors, threads or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from dnc_dist.base.errors import InputError
from dnc_dist.base.exact import squared_distance
from dnc_dist.clustering.centroids import GRID_BITS, on_grid
from dnc_dist.clustering.sums import blocks

Kind = Literal["groups", "neighbours"]
HALVINGS = 16
"""Rounds in which two halves of a group may exchange classes; most settle earlier."""
_PRODUCT_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class GroupRules:
    """How classes are grouped."""

    kind: Kind
    classes: int
    """Of a group, at least 2."""
    skip_nearest: int = 0
    """Nearest classes that a class does not meet: ``neighbours`` takes the ranks behind them; ``groups`` deals out the classes of a
    group so many times as large, plus one, so that neighbours fall into different groups."""


def check_groups(labels: np.ndarray, rules: GroupRules) -> None:
    """Refuse groups that would be all of the classes, before anything is computed.

    Raises:
        InputError: there are not more classes than a group has and passes over.
    """
    classes, needed = int((np.unique(labels, return_counts=True)[1] >= 2).sum()), rules.classes + rules.skip_nearest
    if needed >= classes:
        skipped = f" and division.skip_nearest={rules.skip_nearest} passes over more" if rules.skip_nearest else ""
        raise InputError(
            f"division.batches={rules.kind}: a group has {rules.classes} classes{skipped}, but the training set has only {classes} "
            "with at least 2 images; set division.group_classes, division.skip_nearest or schedule.batch_size lower, or "
            "division.batches=learner"
        )


def class_groups(means: np.ndarray, learner_of_class: np.ndarray, rules: GroupRules) -> np.ndarray:
    """The groups of each learner's classes; a pure function of its arguments.

    A learner with fewer classes than a group has and passes over groups what it has, and passes over as few as it must.

    Args:
        means: (C, F) of unit length.
        learner_of_class: (C,) the learner of each class; -1: in no group.
        rules: how.

    Returns:
        (G, n) int32 classes of every group, learner by learner; -1: no more. ``neighbours``: its own class stands first.
    """
    make = _halved if rules.kind == "groups" else _neighbourhoods
    found = []
    for learner in np.unique(learner_of_class[learner_of_class >= 0]):
        classes = np.flatnonzero(learner_of_class == learner)
        found += [classes[group] for group in make(on_grid(torch.from_numpy(means[classes].astype(np.float32)), 0).numpy(), rules)]
    table = np.full((len(found), max(map(len, found), default=0)), -1, np.int32)
    for line, group in zip(table, found, strict=True):
        line[: len(group)] = group
    return table


def _neighbourhoods(points: np.ndarray, rules: GroupRules) -> list[np.ndarray]:
    """Each of the points (c, F) with those at the ranks behind ``skip_nearest``; of equally near ones the first."""
    count = len(points)
    others = min(rules.classes, count) - 1
    first = 1 + min(rules.skip_nearest, count - 1 - others)
    squares = np.einsum("ij,ij->i", points, points)
    found: list[np.ndarray] = []
    for block in blocks(count, count, _PRODUCT_ELEMENTS):
        own = np.arange(block.start, block.stop)
        # Whole numbers, so an order that is the same everywhere: by distance (less the own length), then by number.
        order = (points[block] @ (-2 * points).T + squares).astype(np.int64) * count + np.arange(count)
        order[own - block.start, own] = np.iinfo(np.int64).min
        if first + others < count:
            order = np.partition(order, first + others, axis=1)[:, : first + others]
        ranked = np.sort(order, axis=1)[:, first:] % count
        found += list(np.concatenate([own[:, None], ranked[:, :others]], axis=1))
    return found


def _halved(points: np.ndarray, rules: GroupRules) -> list[np.ndarray]:
    """Groups of the points (c, F), each point in one; with ``skip_nearest`` large groups, whose points are dealt out in their order."""
    everything = np.arange(len(points))
    if not rules.skip_nearest:
        return _parts(points, everything, -(-len(points) // rules.classes))
    found = []
    for members in _parts(points, everything, max(1, len(points) // (rules.classes * (1 + rules.skip_nearest)))):
        # Halved down to single classes, so that near ones stand side by side, and go to different groups.
        line = np.concatenate(_parts(points, members, len(members)))
        groups = -(-len(line) // rules.classes)
        found += [line[at::groups] for at in range(groups)]
    return found


def _parts(points: np.ndarray, members: np.ndarray, number: int) -> list[np.ndarray]:
    """Members cut into ``number`` parts of close ones, equally large but for one; near parts follow each other."""
    if number == 1:
        return [members]
    first = number // 2
    low, high = _halves(points[members], len(members) * first // number)
    return _parts(points, members[low], first) + _parts(points, members[high], number - first)


def _halves(points: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """``size`` of the points (c, F) and the others: 2-means with halves of given sizes, begun from two points that lie far apart.

    With given means and sizes, the points in the order of their projections on the line between the means are the best halves.
    """
    squares = np.einsum("ij,ij->i", points, points)
    one = int((squares - 2 * (points @ points[0])).argmax())
    other = int((squares - 2 * (points @ points[one])).argmax())
    line = points[other] - points[one]
    before = np.zeros(len(points), bool)
    for _ in range(HALVINGS):
        order = np.argsort(points @ line, kind="stable")
        low = np.zeros(len(points), bool)
        low[order[:size]] = True
        if (low == before).all():
            break
        before = low
        # Sums of whole numbers: exact.
        line = points[~low].mean(0, dtype=np.float64) - points[low].mean(0, dtype=np.float64)
        length = np.sqrt(squared_distance(line, np.zeros(1)))
        line = np.rint(line * 2.0 ** (GRID_BITS - np.frexp(length)[1])).astype(np.float32)
    return np.flatnonzero(before), np.flatnonzero(~before)
