"""Which of all queries say why a model errs: chosen from what every query found, the same on every rank."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dnc_dist.base.rng import numpy_generator
from dnc_dist.retrieval.protocols import Queries

SHOWN = 12
"""Entries of a list."""
CANDIDATES = 64
"""Queries that are looked at for wrong labels."""
EXAMPLES = 4
HUBS = 8
LEAST_HUB = 3
"""An image is nearest to one other on average: with so many queries of other classes it is a hub."""
CLOSE = 0.05
"""Images of two classes are suspiciously alike if they are nearer than all but this share of the right pairs."""
TWIN = 0.01
"""A distance between unit vectors (a cosine above 0.99995) that two different photographs hardly have."""
BARS = 40
RANKS = np.array([1, 2, 3, 6, 11, 101])
"""Where the groups of ranks begin; after the last comes a group for first hits that were not listed."""
SAMPLED = 1000
SAMPLED_MISSES = 500


class Mistakes(NamedTuple):
    """Numbers of queries are their places in ``Queries``; a miss is a query whose nearest row is of another class."""

    misses: np.ndarray  # (w,) int64 all of them, ascending
    worst: np.ndarray  # (l,) int64 queries
    alike: np.ndarray  # (l,) int64 queries
    candidates: np.ndarray  # (l,) int64 queries that may have a wrong label
    pairs: np.ndarray  # (c, 2) int64 classes a, b; more queries of a find b than the other way round
    pair_counts: np.ndarray  # (c, 2) int64 queries of a that found b, of b that found a
    pair_queries: np.ndarray  # (c, 2) int64 all queries of a, of b
    pair_examples: list[np.ndarray]  # (c,) of (e,) queries, the first of a
    hubs: np.ndarray  # (h,) int64 rows
    hub_counts: np.ndarray  # (h, 3) int64 queries of other classes, these classes, queries of its own class
    hub_examples: list[np.ndarray]  # (h,) of (e,) queries
    sampled: np.ndarray  # (s,) int64 queries, of all
    missed: np.ndarray  # (s,) int64 queries, of the misses

    def shown(self) -> np.ndarray:
        """All queries that may be shown, ascending."""
        return np.unique(np.concatenate([self.worst, self.alike, self.candidates, *self.pair_examples, *self.hub_examples]))


def find_mistakes(found: Queries, labels: np.ndarray) -> Mistakes:
    """Choose what to look at.

    Args:
        found: of all queries.
        labels: (N,) int64 of all rows.
    """
    label, other, known = labels[found.rows], labels[found.nearest], found.nearest >= 0
    right = known & (label == other)
    misses = np.flatnonzero(known & ~right)
    near = misses[np.lexsort((misses, found.distance[misses]))]  # the nearest first
    pairs, counts, pair_examples = _pairs(near, found, label, other, len(labels))
    hubs, hub_counts, hub_examples = _hubs(near, found, label, right, len(labels))
    return Mistakes(
        misses,
        worst=_worst(misses, found),
        alike=_alike(near, found, right),
        candidates=near[found.average_precision[near] == 0][:CANDIDATES],
        pairs=pairs,
        pair_counts=counts,
        pair_queries=np.bincount(label, minlength=int(labels.max(initial=0)) + 1)[pairs],
        pair_examples=pair_examples,
        hubs=hubs,
        hub_counts=hub_counts,
        hub_examples=hub_examples,
        sampled=drawn("sampled queries", np.arange(len(found.rows)), SAMPLED),
        missed=drawn("sampled misses", misses, SAMPLED_MISSES),
    )


def drawn(purpose: str, numbers: np.ndarray, count: int) -> np.ndarray:
    """Some of the numbers (n,), ascending; which ones depends on how many there are."""
    return np.sort(numpy_generator(purpose, len(numbers)).permutation(numbers)[:count])


def _worst(misses: np.ndarray, found: Queries) -> np.ndarray:
    """Those whose first hit comes last; of equal ones the most confident first."""
    rank = np.where(found.first_hit == 0, np.iinfo(np.int64).max, found.first_hit)[misses]
    return misses[np.lexsort((misses, found.distance[misses], -rank))][:SHOWN]


def _alike(near: np.ndarray, found: Queries, right: np.ndarray) -> np.ndarray:
    """Pairs of different classes that are nearer than nearly all right ones; every pair once."""
    most = np.quantile(found.distance[right], CLOSE) if right.any() else np.inf
    near = near[found.distance[near] <= max(most, TWIN**2)][: 2 * SHOWN]
    return near[_once(found, near)][:SHOWN]


def _once(found: Queries, queries: np.ndarray) -> np.ndarray:
    """Places in ``queries`` of the first of each two that found each other, and of all others."""
    both = np.sort(np.stack([found.rows[queries], found.nearest[queries]], axis=1), axis=1)
    return np.sort(np.unique(both, axis=0, return_index=True)[1])


def _pairs(
    near: np.ndarray, found: Queries, label: np.ndarray, other: np.ndarray, num_rows: int
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The classes that are taken for each other most often: (c, 2), how often each way (c, 2), and queries of each, nearest first."""
    a, b = label[near], other[near]
    low, high = np.minimum(a, b), np.maximum(a, b)
    key = low * num_rows + high
    keys, counts = np.unique(key, return_counts=True)
    keys = keys[np.lexsort((keys, -counts))][:SHOWN]
    pairs, both, examples = [], [], []
    for one in keys:
        inside = near[key == one]
        first = one // num_rows
        upwards = int((label[inside] == first).sum())
        there, back = (upwards, len(inside) - upwards) if 2 * upwards >= len(inside) else (len(inside) - upwards, upwards)
        from_class = first if there == upwards else one % num_rows
        pairs.append((from_class, one % num_rows + first - from_class))
        both.append((there, back))
        inside = inside[_once(found, inside)]
        # Begin with one that goes the usual way.
        begin = int(np.argmax(label[inside] == from_class))
        examples.append(np.concatenate([inside[begin : begin + 1], np.delete(inside, begin)])[:EXAMPLES])
    return np.array(pairs, np.int64).reshape(-1, 2), np.array(both, np.int64).reshape(-1, 2), examples


def _hubs(
    near: np.ndarray, found: Queries, label: np.ndarray, right: np.ndarray, num_rows: int
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Rows that are the nearest of many queries of other classes, how many and of how many classes, and queries of each."""
    wrong = np.bincount(found.nearest[near], minlength=num_rows)
    own = np.bincount(found.nearest[right], minlength=num_rows)
    rows = np.flatnonzero(wrong >= LEAST_HUB)
    rows = rows[np.lexsort((rows, -wrong[rows]))][:HUBS]
    counts, examples = [], []
    for row in rows:
        asked = near[found.nearest[near] == row]
        # Of different classes, if there are.
        classes, first = np.unique(label[asked], return_index=True)
        counts.append((len(asked), len(classes), own[row]))
        order = np.concatenate([np.sort(first), np.setdiff1d(np.arange(len(asked)), first)])
        examples.append(asked[order[:EXAMPLES]])
    return rows, np.array(counts, np.int64).reshape(-1, 3), examples


def ranks_in_groups(found: Queries) -> np.ndarray:
    """(7,) int64 queries by the rank of their first hit; the last group are those of which it was not listed."""
    group = np.searchsorted(RANKS, found.first_hit, side="right") - 1
    return np.bincount(np.where(found.first_hit == 0, len(RANKS), group), minlength=len(RANKS) + 1)


def distances_in_bars(found: Queries, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(b + 1,) float32 borders, and (2, b) int64 queries by the distance to the nearest row: where that is right, and where it is wrong."""
    distance = np.sqrt(found.distance[found.nearest >= 0])
    right = (labels[found.rows] == labels[found.nearest])[found.nearest >= 0]
    edges = np.linspace(0, max(float(distance.max(initial=0)), TWIN), BARS + 1).astype(np.float32)
    at = np.clip(np.searchsorted(edges, distance, side="right") - 1, 0, BARS - 1)
    return edges, np.stack([np.bincount(at[one], minlength=BARS) for one in (right, ~right)])
