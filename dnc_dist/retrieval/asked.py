"""What queries have found so far: their nearest row, and how many rows come before each row of their own class.

A row comes before another one if its (float32 distance, row) is smaller. Approximate distances decide where their error cannot matter;
all others are computed again, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

NO_ROW = np.iinfo(np.int64).max
"""Fills the lists of queries that have fewer relevant rows than others, at distance inf."""


@dataclass
class Hits:
    """Rows (h,) that are within the reach of a query, none of which is the query itself."""

    query: np.ndarray  # which query
    ids: np.ndarray  # int64 the rows
    labels: np.ndarray  # int64
    approximate: np.ndarray  # float32 squared distance
    error: np.ndarray  # float64 the most by which it differs from the exact float32 distance
    exact: Callable[[np.ndarray], np.ndarray]  # the exact float32 distances of some hits, by their places here


@dataclass
class Asked:
    """Queries (q,), each with its relevant rows (R columns) by (distance, row)."""

    ids: np.ndarray  # (q,) int64
    labels: np.ndarray  # (q,) int64
    number: np.ndarray  # (q,) int64, ascending
    rows: np.ndarray  # (q, R) int64 the relevant rows
    keys: np.ndarray  # (q, R) int64 ``key`` of the query's number and its distance to each
    before: np.ndarray  # (q, R) int32 rows of other classes that come before this relevant row, but not before the one before it
    reach: np.ndarray  # (q,) float32: rows that are farther change nothing any more
    near_row: np.ndarray  # (q,) int64 the nearest row, of any class
    near_distance: np.ndarray  # (q,) float32 to it

    @classmethod
    def new(cls, ids: np.ndarray, labels: np.ndarray, rows: np.ndarray, distance: np.ndarray) -> Asked:
        """Queries with their relevant rows and the float32 distances (q, R) to these; nothing else was compared with them yet."""
        number = np.arange(len(ids))
        before, reach = np.zeros(rows.shape, np.int32), np.full(len(ids), np.inf, np.float32)
        return cls(
            ids, labels, number, rows, _key(number[:, None], distance), before, reach, rows[:, 0].copy(), distance[:, 0].astype(np.float32)
        )

    def part(self, which: slice) -> Asked:
        """Some of them; the arrays are shared."""
        return Asked(*(getattr(self, field.name)[which] for field in fields(self)))

    def packed(self) -> np.ndarray:
        """(q, 5 + 2 R) int64: all that another rank must know to go on."""
        columns = [self.ids, self.labels, _bits(self.reach), self.near_row, _bits(self.near_distance)]
        return np.concatenate([np.stack(columns, 1), self.rows, self.keys], axis=1)

    @classmethod
    def unpacked(cls, packed: np.ndarray) -> Asked:
        """What ``packed`` says of the queries of all ranks, with nothing counted."""
        ids, labels, reach, near_row, near_distance = packed[:, :5].T
        rows, keys = np.split(packed[:, 5:], 2, axis=1)
        asked = cls.new(ids, labels, np.ascontiguousarray(rows), _distance(keys))
        asked.reach, asked.near_row, asked.near_distance = _distance(reach), near_row.copy(), _distance(near_distance)
        return asked

    def found(self) -> np.ndarray:
        """(q, 2 + R) int64: what was found, for the rank that asks."""
        return np.concatenate([np.stack([self.near_row, _bits(self.near_distance)], 1), self.before], axis=1)

    def add(self, found: np.ndarray) -> None:
        """Take in what was ``found`` (W, q, 2 + R) among rows that were not counted here."""
        self.before += found[:, :, 2:].sum(0, dtype=np.int32)
        for near_row, near_distance in found[:, :, :2].transpose(0, 2, 1):
            self._take_nearer(np.arange(len(self.ids)), near_row, _distance(near_distance))

    def places(self) -> np.ndarray:
        """(q, R) int64: the place of each relevant row, from 1, among all rows that were counted and the relevant ones."""
        return np.cumsum(self.before, 1, dtype=np.int64) + np.arange(1, self.rows.shape[1] + 1)

    def narrow(self) -> None:
        """Shorten the reach to the last relevant row that may still be one of the first R, but never below the first one of all."""
        within = (self.places() <= (self.rows != NO_ROW).sum(1)[:, None]).sum(1)
        last = _distance(self.keys[np.arange(len(self.ids)), np.maximum(within, 1) - 1])
        self.reach[:] = np.where(self.rows[:, 0] == NO_ROW, -np.inf, np.minimum(self.reach, last))

    def count(self, hits: Hits) -> None:
        """Count hits of other classes, and keep the nearest one."""
        least, most = hits.approximate - hits.error, hits.approximate + hits.error
        # What comes before all relevant rows needs no further look; of a poor model these are many.
        first = most < _distance(self.keys[:, 0])[hits.query]
        self.before[:, 0] += np.bincount(hits.query[first], minlength=len(self.ids)).astype(np.int32)
        other = self.labels[hits.query] != hits.labels
        self._look_nearer(np.flatnonzero((least <= self.near_distance[hits.query]) & other), least, most, hits)
        rest = np.flatnonzero(~first & other)
        query, keys, rows = hits.query[rest], self.keys.ravel(), self.rows.ravel()
        place = np.searchsorted(keys, _key(self.number[query], least[rest]), "left")
        doubt = np.flatnonzero(place < np.searchsorted(keys, _key(self.number[query], most[rest]), "right"))
        key = _key(self.number[query[doubt]], hits.exact(rest[doubt]))
        at = np.searchsorted(keys, key, "left")
        while len(doubt):
            place[doubt] = at
            # Of equal distances the smaller row comes first.
            later = (at < len(keys)) & (keys[np.minimum(at, len(keys) - 1)] == key)
            later[later] = rows[at[later]] < hits.ids[rest[doubt[later]]]
            doubt, key, at = doubt[later], key[later], at[later] + 1
        place = place[place < (query + 1) * self.rows.shape[1]]
        self.before += np.bincount(place, minlength=self.before.size).reshape(self.before.shape).astype(np.int32)

    def _look_nearer(self, which: np.ndarray, least: np.ndarray, most: np.ndarray, hits: Hits) -> None:
        """Whether one of some hits is the nearest row so far."""
        nearest = np.full(len(self.ids), np.inf)
        np.minimum.at(nearest, hits.query[which], most[which])
        which = which[least[which] <= nearest[hits.query[which]]]
        query, ids, distance = hits.query[which], hits.ids[which], hits.exact(which)
        order = np.lexsort((ids, distance, query))
        queries, first = np.unique(query[order], return_index=True)
        self._take_nearer(queries, ids[order][first], distance[order][first])

    def _take_nearer(self, query: np.ndarray, ids: np.ndarray, distance: np.ndarray) -> None:
        row, known = self.near_row[query], self.near_distance[query]
        nearer = (distance < known) | ((distance == known) & (ids < row))
        self.near_row[query[nearer]], self.near_distance[query[nearer]] = ids[nearer], distance[nearer]


def _bits(distance: np.ndarray) -> np.ndarray:
    """(…) int64 that hold these float32 numbers, in their order if none is negative."""
    return np.ascontiguousarray(distance, np.float32).view(np.int32).astype(np.int64)


def _distance(bits: np.ndarray) -> np.ndarray:
    """(…) float32: what the lower half of these int64 holds."""
    return bits.astype(np.int32).view(np.float32)


def _key(number: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """(…) int64 in the order of (query, float32 distance); what is below 0 counts as 0."""
    return number << 32 | _bits(np.where(distance > 0, distance, 0))
