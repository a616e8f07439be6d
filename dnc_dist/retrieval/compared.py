"""The rows of one rank compared with queries: float32 products say which rows matter, and how near they are within a known error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dnc_dist.base.exact import gram_error, squared_distance
from dnc_dist.processes import distributed
from dnc_dist.retrieval.asked import NO_ROW, Asked, Hits
from dnc_dist.retrieval.gallery import Gallery, squares
from dnc_dist.retrieval.products import products_on

HITS = 1 << 16
DIFFERENCES = 1 << 18
HASHED = 1024
"""Bounds on the hits that are looked at together, on one block's differences (rows x D), and on the rows that are hashed at a time."""


class _Side(NamedTuple):
    """Rows (b,) on one side of products."""

    vectors: np.ndarray  # (n, D), the rows among others
    at: np.ndarray  # (b,) int64 where they are there
    ids: np.ndarray  # (b,)
    labels: np.ndarray  # (b,)
    factors: Tensor  # (b, D + 2) float32, loaded; products of two sides are squared distances
    norms: np.ndarray  # (b,) float64 lengths, less the centre
    twin: np.ndarray  # (b,) int64, the same for equal vectors


class Searched(Gallery):
    """The gallery rows of this rank with their labels."""

    def __init__(self, vectors: np.ndarray, ids: np.ndarray, labels: np.ndarray) -> None:
        super().__init__(vectors, ids)
        self.labels = labels[self.at]
        self._by_label = np.argsort(self.labels, kind="stable")
        self._sorted_labels = self.labels[self._by_label]
        self._twin = _twins(len(self), self.rows)
        self.products = products_on(distributed.device())
        self._loaded: dict[int, Tensor] = {}  # factors that stay on a device, by the first row of their block

    def relevant(self, visitors: np.ndarray, ids: np.ndarray, labels: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows (Q, R) here with the labels of these queries (Q, D), themselves excluded, and the exact distances, nearest first."""
        start = np.searchsorted(self._sorted_labels, labels, "left")
        count = np.searchsorted(self._sorted_labels, labels, "right") - start
        query = np.repeat(np.arange(len(ids)), count)
        row = self._by_label[np.arange(len(query)) + np.repeat(start - np.cumsum(count) + count, count)]
        other = self.ids[row] != ids[query]
        query, row = query[other], row[other]
        distance = _distances(visitors, query, self.vectors, self.at[row])
        order = np.lexsort((self.ids[row], distance, query))
        query, row, distance = query[order], row[order], distance[order]
        column = np.arange(len(query)) - np.searchsorted(query, query, "left")
        rows, near = np.full((len(ids), most), NO_ROW), np.full((len(ids), most), np.inf, np.float32)
        rows[query, column], near[query, column] = self.ids[row], distance
        return rows, near

    def serve(self, visitors: np.ndarray, visiting: Asked) -> None:
        """Count all rows for the queries (Q, D) that visit this rank."""
        left, everyone = self._left(visitors, visiting), np.arange(len(visitors))
        for at in range(0, len(self), self.products.tile):
            self._compare(left, everyone, visiting, slice(at, at + self.products.tile), None)

    def exchange(self, visitors: np.ndarray, visiting: Asked, counts: list[int], own: Asked, parts: list[slice], number: int) -> None:
        """Count rows for the queries (Q, D) that visit this rank, and the visitors for the rows: once for every pair.

        Block x of one rank meets part y of another one twice: when x visits, and when y does. Each rank skips one half of these.

        Args:
            visiting: of every rank the block ``number`` of its rows, ``counts`` in all.
            own: what all rows of this rank ask.
            parts: the blocks of this rank.
        """
        left, me = self._left(visitors, visiting), distributed.rank()
        of_rank = np.split(np.arange(len(visitors)), np.cumsum(counts)[:-1])
        for part, which in enumerate(parts):
            now = [part > number if rank == me else ((part + number) % 2 == 0) == (me < rank) for rank in range(len(counts))]
            others = [of_rank[rank] if compared else of_rank[rank][:0] for rank, compared in enumerate(now)]
            self._compare(left, np.concatenate(others), visiting, which, own.part(which))
            if part == number:
                self._compare(left, of_rank[me], visiting, which, None)

    def _left(self, visitors: np.ndarray, visiting: Asked) -> _Side:
        centred = visitors - self.centre
        square = squares(centred)
        factors = np.empty((len(centred), centred.shape[1] + 2), np.float32)
        factors[:, :-2], factors[:, -2], factors[:, -1] = -2 * centred, square, 1
        twin = _twins(len(visitors), visitors.__getitem__)
        loaded = self.products.load(factors)
        return _Side(visitors, np.arange(len(visitors)), visiting.ids, visiting.labels, loaded, np.sqrt(square), twin)

    def _right(self, which: slice) -> _Side:
        norms = np.sqrt(self.square[which])
        return _Side(self.vectors, self.at[which], self.ids[which], self.labels[which], self._factors(which), norms, self._twin[which])

    def _factors(self, which: slice) -> Tensor:
        """Those of a block of rows. A block begins at the same rows whenever it is asked for."""
        if which.start in self._loaded:
            return self._loaded[which.start]
        rows = self.rows(which)
        factors = np.empty((len(rows), rows.shape[1] + 2), np.float32)
        np.subtract(rows, self.centre, out=factors[:, :-2])
        factors[:, -2], factors[:, -1] = 1, self.square[which]
        loaded = self.products.load(factors)
        if self.products.keeps:
            self._loaded[which.start] = loaded
        return loaded

    def _compare(self, left: _Side, chosen: np.ndarray, visiting: Asked, which: slice, own: Asked | None) -> None:
        """Count some rows for the chosen queries on the left; and these queries for the rows, if the rows ask, too."""
        if not len(chosen) or not len(self.ids[which]):
            return
        right = self._right(which)
        dim = self.vectors.shape[1]
        left_error = np.asarray(gram_error(dim, left.norms, self.longest))
        right_error = np.asarray(gram_error(dim, right.norms, float(left.norms.max())))
        for start in range(0, len(chosen), self.products.tile):
            queries = chosen[start : start + self.products.tile]
            together = queries[-1] - queries[0] + 1 == len(queries)  # ascending: then nothing has to be copied
            factors = left.factors[queries[0] : queries[-1] + 1] if together else left.factors[queries]
            product = self.products.distances(factors, right.factors)
            at = np.minimum(np.searchsorted(right.ids, left.ids[queries]), len(right.ids) - 1)
            # A query that is searched, too, does not find itself.
            itself = np.flatnonzero(right.ids[at] == left.ids[queries])
            product[itself, at[itself]] = np.inf
            for visitor, row, approximate in self._within_reach(product, (visiting.reach + left_error)[queries, None]):
                query = queries[visitor]
                exact = partial(_exact, left, query, right, row)
                visiting.count(Hits(query, right.ids[row], right.labels[row], approximate, left_error[query], exact))
            visiting.narrow()
            if own is None:
                continue
            for visitor, row, approximate in self._within_reach(product, own.reach + right_error):
                query = queries[visitor]
                exact = partial(_exact, right, row, left, query)
                own.count(Hits(row, left.ids[query], left.labels[query], approximate, right_error[row], exact))
            own.narrow()

    def _within_reach(self, product: Tensor, reach: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Where a product is at most ``reach`` (broadcast against it): its rows, its columns, and its numbers."""
        places, numbers = self.products.within(product, np.nextafter(reach.astype(np.float32), np.float32(np.inf)))
        for at in range(0, len(places), HITS):
            yield *np.divmod(places[at : at + HITS], product.shape[1]), numbers[at : at + HITS]


def _twins(count: int, rows: Callable[[slice | np.ndarray], np.ndarray]) -> np.ndarray:
    """(n,) int64: for each row an equal one, the same for all that are equal, but for hashes that happen to be the same."""
    hashes = [_hash(rows(slice(at, at + HASHED))) for at in range(0, count, HASHED)]
    _, first, place = np.unique(np.concatenate([np.empty(0, np.int64), *hashes]), return_index=True, return_inverse=True)
    twin = first[place]
    doubled = np.flatnonzero(twin != np.arange(count))
    for at in range(0, len(doubled), HASHED):
        block = doubled[at : at + HASHED]
        other = block[(rows(block) != rows(twin[block])).any(1)]
        twin[other] = other
    return twin


def _hash(vectors: np.ndarray) -> np.ndarray:
    """(n,) int64 of float32 rows (n, D), by their bits."""
    factors = np.random.default_rng(vectors.shape[1]).integers(np.iinfo(np.int64).max, size=vectors.shape[1]) | 1
    return np.ascontiguousarray(vectors).view(np.int32).astype(np.int64) @ factors


def _exact(queries: _Side, query: np.ndarray, rows: _Side, row: np.ndarray, which: np.ndarray) -> np.ndarray:
    """(h,) exact float32 distances of some pairs, by their places on both sides; pairs of equal vectors are computed once.

    A model that has collapsed makes most vectors equal, and then every pair is in doubt.
    """
    query, row = query[which], row[which]
    pairs = queries.twin[query] * (rows.twin.max(initial=0) + 1) + rows.twin[row]
    _, first, place = np.unique(pairs, return_index=True, return_inverse=True)
    return _distances(queries.vectors, queries.at[query[first]], rows.vectors, rows.at[row[first]])[place]


def _distances(queries: np.ndarray, query: np.ndarray, rows: np.ndarray, row: np.ndarray) -> np.ndarray:
    """(h,) exact float32 distances of pairs of a query (by its place among the queries) and a row."""
    distance = np.empty(len(query), np.float32)
    step = max(1, DIFFERENCES // queries.shape[1])
    for at in range(0, len(query), step):
        distance[at : at + step] = squared_distance(queries[query[at : at + step]], rows[row[at : at + step]])
    return distance
