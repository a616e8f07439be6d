"""Exact nearest neighbours with gallery rows spread over ranks: the same neighbours and digits for any number of ranks.

Candidates are proposed in float32, by FAISS or a GPU; their distances are computed again by direct difference in a fixed order, and
a query whose candidates might not hold all of its k nearest, by the error bound of the float32 products, asks for more.
The gallery is never copied as a whole: beside it, memory holds blocks of bounded size and a few numbers per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import faiss
import numpy as np
import torch
from torch import Tensor

from dnc_dist.base.exact import gram_error, squared_distance
from dnc_dist.processes import distributed
from dnc_dist.retrieval.gallery import Gallery, first_columns, squares
from dnc_dist.retrieval.products import proposals

MARGIN = 8
"""More candidates than neighbours asked for, so that few queries have to ask twice."""

WORK_ELEMENTS = 1 << 20
CANDIDATES = 1 << 21
LIST_ELEMENTS = 1 << 22
"""Bounds on one block's differences (rows x D), its candidates, and on the queries (x D) and neighbour lists that a rank holds before
merging."""


class Neighbours(NamedTuple):
    """The k nearest gallery rows of each local query, nearest first; ties by gallery row. Missing ones: row -1, distance inf."""

    ids: Tensor  # (q, k) int64
    distance: Tensor  # (q, k) float32, squared


def topk(query_local: Tensor, gallery_local: Tensor, k: int, *, query_ids: Tensor, gallery_ids: Tensor, exclude_self: bool) -> Neighbours:
    """Collective. The k nearest gallery rows of all ranks for the queries of this rank.

    Args:
        query_local: (q, D) queries of this rank; q may be 0.
        gallery_local: (g, D) rows of this rank; g may be 0.
        k: neighbours wanted.
        query_ids: (q,) int64 global rows.
        gallery_ids: (g,) int64 global rows, no row on two ranks; -1: the row is not searched.
        exclude_self: a query is not its own neighbour, by its row.

    Returns:
        Squared Euclidean distances and rows, ordered by (float32 distance, row).
    """
    blocks = topk_blocks(query_local, gallery_local, k, query_ids=query_ids, gallery_ids=gallery_ids, exclude_self=exclude_self)
    found = [near for _, near in blocks] or [Neighbours(torch.empty(0, k, dtype=torch.int64), torch.empty(0, k))]
    return Neighbours(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def topk_blocks(
    query_local: Tensor, gallery_local: Tensor, k: int, *, query_ids: Tensor, gallery_ids: Tensor, exclude_self: bool
) -> Iterator[tuple[slice, Neighbours]]:
    """Collective. ``topk`` for some queries after the others, so that memory does not grow with their number.

    Queries travel to every rank in blocks; each rank answers from its own gallery rows, and the lists are merged.

    Yields:
        Which of this rank's queries (maybe none), and their neighbours; equally often on every rank.
    """
    device, world = distributed.device(), distributed.world_size()
    gallery = _Candidates(gallery_local.detach().float().cpu().numpy(), gallery_ids.cpu().numpy())
    queries, ids = query_local.detach().float().cpu(), query_ids.cpu()
    per_rank = max(1, LIST_ELEMENTS // (world * max(k, queries.shape[1])))
    most = int(distributed.gather_rows(torch.tensor([len(queries)], device=device)).max())
    for at in range(0, most, per_rank):
        block = queries[at : at + per_rank]
        counts = distributed.gather_rows(torch.tensor([len(block)], device=device)).tolist()
        everyone = distributed.gather_rows(block.to(device), counts=counts).cpu().numpy()
        everyone_ids = distributed.gather_rows(ids[at : at + per_rank].to(device), counts=counts).cpu().numpy()
        # (W, b, k) from all galleries -> (b, W k) for each query.
        all_rows, all_distance = (
            distributed.exchange_rows(torch.from_numpy(part).to(device), counts).cpu().transpose(0, 1).flatten(1).numpy()
            for part in gallery.search(everyone, k, everyone_ids if exclude_self else None)
        )
        merged = first_columns(all_rows, all_distance, k)
        yield slice(at, at + len(block)), Neighbours(*(torch.from_numpy(part) for part in merged))


def place_of_match(
    query_local: Tensor,
    match_ids: Tensor,
    gallery_local: Tensor,
    gallery_ids: Tensor,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Collective. For each query of this rank, the place of one given gallery row in the order that ``topk`` would give.

    Nearer rows are counted and never listed, so memory does not grow with queries x gallery. The gallery travels to every rank
    (it is small: one row per class) and queries stay where they are.

    Args:
        query_local: (q, D) queries of this rank; q may be 0.
        match_ids: (q,) int64 the gallery row, of any rank, whose place is wanted.
        gallery_local: (g, D) gallery rows of this rank; g may be 0.
        gallery_ids: (g,) int64 global rows, no row on two ranks.
        tick: called before each block of this rank's work, with how much of how much is done.

    Returns:
        (q,) int64, 1 for the nearest.
    """
    device = distributed.device()
    ids = distributed.gather_rows(gallery_ids.to(device)).cpu()
    rows = distributed.gather_rows(gallery_local.detach().float().to(device)).cpu()
    gallery = _Candidates(rows.numpy(), ids.numpy())
    return torch.from_numpy(gallery.places(query_local.detach().float().cpu().numpy(), match_ids.cpu().numpy(), tick))


class _Candidates(Gallery):
    """The gallery rows of this rank, of which some are proposed as candidates."""

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(Q, k) ids and float32 distances of the nearest rows here but ``exclude`` (Q,), padded with (-1, inf)."""
        more = 0 if exclude is None else 1
        ids, distance = self._search(queries, k + more, min(k + more + MARGIN, len(self.ids)))
        if exclude is None:
            return ids, distance
        itself = ids == exclude[:, None]
        ids[itself], distance[itself] = -1, np.inf
        return first_columns(ids, distance, k)

    def _search(self, queries: np.ndarray, k: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """(Q, k) ids and distances from ``wanted`` candidates, from more where these may not hold all of the k nearest."""
        ids = np.full((len(queries), k), -1)
        distance = np.full((len(queries), k), np.inf, np.float32)
        done = np.ones(len(queries), bool)
        step = max(1, CANDIDATES // max(1, wanted))
        for at in range(0, len(queries), step):
            rows, columns = slice(at, at + step), slice(0, min(k, wanted))
            ids[rows, columns], distance[rows, columns], done[rows] = self._nearest(queries[rows], k, wanted)
        if not done.all():
            # Ties that reach beyond the candidates mostly come from equal vectors: equal queries are asked once.
            unique, inverse = np.unique(queries[~done], axis=0, return_inverse=True)
            wider = self._search(unique, k, min(4 * wanted, len(self.ids)))
            ids[~done], distance[~done] = wider[0][inverse], wider[1][inverse]
        return ids, distance

    def _nearest(self, queries: np.ndarray, k: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | bool]:
        """Ids and distances (Q, min(k, wanted)), and whether (Q,) no row beyond the candidates can belong to them."""
        if wanted == len(self.ids):
            every = np.broadcast_to(np.arange(wanted), (len(queries), wanted))
            return *first_columns(self.ids[every], self._distances(queries, every), k), True
        centred = np.ascontiguousarray(queries - self.centre)
        propose = proposals(centred, distributed.device())
        best = faiss.ResultHeap(len(queries), wanted)
        for at, block in self.centred_blocks():
            approximate, row = propose(block, min(wanted, len(block)))
            best.add_result(approximate, row + at)
        best.finalize()
        ids, distance = first_columns(self.ids[best.I], self._distances(queries, best.I), k)
        nearest_other = best.D[:, -1] - gram_error(queries.shape[1], np.sqrt(squares(centred)), self.longest)
        return ids, distance, distance[:, -1] < nearest_other.astype(np.float32)

    def places(self, queries: np.ndarray, match: np.ndarray, tick: Callable[[int, int], None]) -> np.ndarray:
        """(Q,) places, from 1, of the rows with the ids ``match`` (Q,)."""
        places, at_match = np.ones(len(queries), np.int64), np.searchsorted(self.ids, match)
        for first, block in self.centred_blocks():
            step = max(1, CANDIDATES // len(block))
            for at in range(0, len(queries), step):
                tick(first * len(queries) + at * len(block), len(self) * len(queries))
                places[at : at + step] += self._num_before(queries[at : at + step], at_match[at : at + step], first, block)
        return places

    def _num_before(self, queries: np.ndarray, match: np.ndarray, first: int, block: np.ndarray) -> np.ndarray:
        """(Q,) rows of a block, from row ``first`` on, that come before row ``match`` (Q,).

        By float32 products where their error cannot matter, else by exact distances.
        """
        wanted = squared_distance(queries, self.rows(match)).astype(np.float32)
        centred = queries - self.centre
        norms = squares(centred)
        approximate = norms[:, None] + squares(block) - 2.0 * (centred @ block.T)
        error = np.asarray(gram_error(queries.shape[1], np.sqrt(norms), self.longest))[:, None]
        # Rounding keeps the order: what is nearer by more than the error is nearer in float32, too.
        nearer = (approximate + error).astype(np.float32) < wanted[:, None]
        query, row = np.nonzero(~nearer & ((approximate - error).astype(np.float32) <= wanted[:, None]))
        row += first
        before = np.empty(len(query), bool)
        step = max(1, WORK_ELEMENTS // queries.shape[1])
        for at in range(0, len(query), step):
            q, r = query[at : at + step], row[at : at + step]
            distance = squared_distance(queries[q], self.rows(r)).astype(np.float32)
            before[at : at + step] = (distance < wanted[q]) | ((distance == wanted[q]) & (r < match[q]))
        return nearer.sum(1) + np.bincount(query[before], minlength=len(queries))

    def _distances(self, queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """(Q, m) float32 squared distances by direct difference."""
        distance = np.empty(candidates.shape, np.float32)
        width = max(1, WORK_ELEMENTS // queries.shape[1])
        for start in range(0, candidates.shape[1], width):
            columns = candidates[:, start : start + width]
            step = max(1, width // columns.shape[1])
            for at in range(0, len(queries), step):
                part = squared_distance(queries[at : at + step, None], self.rows(columns[at : at + step]))
                distance[at : at + step, start : start + width] = part
        return distance
