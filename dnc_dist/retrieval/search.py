"""Exact nearest neighbours with gallery rows spread over ranks: the same neighbours and digits for any number of ranks.

FAISS proposes candidates in float32; their distances are computed again by direct difference in a fixed order, and a
query whose candidates might not hold all of its k nearest, by the error bound of the float32 products, asks for more.
"""

from __future__ import annotations

from typing import NamedTuple

import faiss
import numpy as np
import torch
from torch import Tensor

from dnc_dist import distributed
from dnc_dist.exact import gram_error, squared_distance

MARGIN = 32
"""More candidates than neighbours asked for, so that few queries have to ask twice."""

WORK_ELEMENTS = 1 << 20
CANDIDATES = 1 << 22
LIST_ELEMENTS = 1 << 24
"""Bounds on one block's differences (rows x D), its candidates, and the neighbour lists that a rank holds before merging."""


class Neighbours(NamedTuple):
    """The k nearest gallery rows of each local query, nearest first; ties by gallery row. Missing ones: row -1, distance inf."""

    ids: Tensor  # (q, k) int64
    distance: Tensor  # (q, k) float32, squared


def topk(query_local: Tensor, gallery_local: Tensor, k: int, *, query_ids: Tensor, gallery_ids: Tensor, exclude_self: bool) -> Neighbours:
    """Collective. The k nearest gallery rows of all ranks for the queries of this rank.

    Queries travel to every rank in blocks; each rank answers from its own gallery rows, and the lists are merged.

    Args:
        query_local: (q, D) queries of this rank; q may be 0.
        gallery_local: (g, D) gallery rows of this rank; g may be 0.
        k: neighbours wanted.
        query_ids: (q,) int64 global rows.
        gallery_ids: (g,) int64 global rows, no row on two ranks.
        exclude_self: a query is not its own neighbour, by its row.

    Returns:
        Squared Euclidean distances and rows, ordered by (float32 distance, row).
    """
    device, world = distributed.device(), distributed.world_size()
    # Rank order of the gallery must not matter, nor the order within a rank: rows are taken by their global number.
    order = torch.argsort(gallery_ids.cpu())
    gallery = _Gallery(gallery_local.detach().float().cpu()[order].numpy(), gallery_ids.cpu()[order].numpy())
    queries, ids = query_local.detach().float().cpu(), query_ids.cpu()
    per_rank = max(1, LIST_ELEMENTS // (k * world * world))
    most = int(distributed.gather_rows(torch.tensor([len(queries)], device=device)).max())
    found_ids, found_distance = [torch.empty(0, k, dtype=torch.int64)], [torch.empty(0, k)]
    for at in range(0, most, per_rank):
        block = queries[at : at + per_rank]
        counts = distributed.gather_rows(torch.tensor([len(block)], device=device)).tolist()
        everyone = distributed.gather_rows(block.to(device)).cpu().numpy()
        everyone_ids = distributed.gather_rows(ids[at : at + per_rank].to(device)).cpu().numpy()
        rows, distance = gallery.search(everyone, k, everyone_ids if exclude_self else None)
        all_rows = distributed.gather_rows(torch.from_numpy(rows).to(device)).cpu().reshape(world, -1, k)
        all_distance = distributed.gather_rows(torch.from_numpy(distance).to(device)).cpu().reshape(world, -1, k)
        start = sum(counts[: distributed.rank()])
        mine = slice(start, start + len(block))
        merged = _first(
            all_rows[:, mine].transpose(0, 1).reshape(len(block), world * k).numpy(),
            all_distance[:, mine].transpose(0, 1).reshape(len(block), world * k).numpy(),
            k,
        )
        found_ids.append(torch.from_numpy(merged[0]))
        found_distance.append(torch.from_numpy(merged[1]))
    return Neighbours(torch.cat(found_ids), torch.cat(found_distance))


def place_of_match(query_local: Tensor, match_ids: Tensor, gallery_local: Tensor, gallery_ids: Tensor) -> Tensor:
    """Collective. For each query of this rank, the place of one given gallery row in the order that ``topk`` would give.

    Nearer rows are counted and never listed, so memory does not grow with queries x gallery. The gallery travels to every rank
    (it is small: one row per class) and queries stay where they are.

    Args:
        query_local: (q, D) queries of this rank; q may be 0.
        match_ids: (q,) int64 the gallery row, of any rank, whose place is wanted.
        gallery_local: (g, D) gallery rows of this rank; g may be 0.
        gallery_ids: (g,) int64 global rows, no row on two ranks.

    Returns:
        (q,) int64, 1 for the nearest.
    """
    device = distributed.device()
    ids = distributed.gather_rows(gallery_ids.to(device)).cpu()
    rows = distributed.gather_rows(gallery_local.detach().float().to(device)).cpu()
    order = torch.argsort(ids)
    gallery = _Gallery(rows[order].numpy(), ids[order].numpy())
    return torch.from_numpy(gallery.places(query_local.detach().float().cpu().numpy(), match_ids.cpu().numpy()))


def _first(rows: np.ndarray, distance: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k columns of each line by (distance, row); unused entries hold distance inf."""
    order = np.lexsort((rows, distance), axis=1)[:, :k]
    return np.take_along_axis(rows, order, 1), np.take_along_axis(distance, order, 1)


class _Gallery:
    """The gallery rows (g, D) of one rank, in the order of their ids (g,)."""

    def __init__(self, rows: np.ndarray, ids: np.ndarray) -> None:
        self.rows, self.ids = rows, ids
        # Close together and far from 0, vectors differ in few digits: candidates are looked for among centred ones.
        self.centre = rows.mean(0, dtype=np.float64).astype(np.float32) if len(rows) else np.zeros(rows.shape[1], np.float32)
        self.centred = np.ascontiguousarray(rows - self.centre)
        self.longest = float(np.sqrt(np.square(self.centred, dtype=np.float64).sum(1)).max(initial=0))

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(Q, k) ids and float32 distances of the nearest rows here but ``exclude`` (Q,), padded with (-1, inf)."""
        more = 0 if exclude is None else 1
        ids, distance = self._search(queries, k + more, min(k + more + MARGIN, len(self.rows)))
        if exclude is None:
            return ids, distance
        itself = ids == exclude[:, None]
        ids[itself], distance[itself] = -1, np.inf
        return _first(ids, distance, k)

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
            wider = self._search(unique, k, min(4 * wanted, len(self.rows)))
            ids[~done], distance[~done] = wider[0][inverse], wider[1][inverse]
        return ids, distance

    def _nearest(self, queries: np.ndarray, k: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | bool]:
        """Ids and distances (Q, min(k, wanted)), and whether (Q,) no row beyond the candidates can belong to them."""
        if wanted == len(self.rows):
            every = np.broadcast_to(np.arange(wanted), (len(queries), wanted))
            return *_first(self.ids[every], self._distances(queries, every), k), True
        centred = np.ascontiguousarray(queries - self.centre)
        approximate, candidates = faiss.knn(centred, self.centred, wanted)
        ids, distance = _first(self.ids[candidates], self._distances(queries, candidates), k)
        norms = np.sqrt(np.square(centred, dtype=np.float64).sum(1))
        nearest_other = approximate[:, -1] - gram_error(queries.shape[1], norms, self.longest)
        return ids, distance, distance[:, -1] < nearest_other.astype(np.float32)

    def places(self, queries: np.ndarray, match: np.ndarray) -> np.ndarray:
        """(Q,) places, from 1, of the rows with the ids ``match`` (Q,)."""
        places, at_match = np.empty(len(queries), np.int64), np.searchsorted(self.ids, match)
        step = max(1, CANDIDATES // max(1, len(self.rows)))
        for at in range(0, len(queries), step):
            places[at : at + step] = 1 + self._num_before(queries[at : at + step], at_match[at : at + step])
        return places

    def _num_before(self, queries: np.ndarray, match: np.ndarray) -> np.ndarray:
        """(Q,) rows that come before row ``match`` (Q,): by float32 products where their error cannot matter, else by exact distances."""
        wanted = squared_distance(queries, self.rows[match]).astype(np.float32)
        centred = queries - self.centre
        norms, squares = (np.square(part, dtype=np.float64).sum(1) for part in (centred, self.centred))
        approximate = norms[:, None] + squares - 2.0 * (centred @ self.centred.T)
        error = np.asarray(gram_error(queries.shape[1], np.sqrt(norms), self.longest))[:, None]
        # Rounding keeps the order: what is nearer by more than the error is nearer in float32, too.
        nearer = (approximate + error).astype(np.float32) < wanted[:, None]
        query, row = np.nonzero(~nearer & ((approximate - error).astype(np.float32) <= wanted[:, None]))
        before = np.empty(len(query), bool)
        step = max(1, WORK_ELEMENTS // queries.shape[1])
        for at in range(0, len(query), step):
            q, r = query[at : at + step], row[at : at + step]
            distance = squared_distance(queries[q], self.rows[r]).astype(np.float32)
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
                part = squared_distance(queries[at : at + step, None], self.rows[columns[at : at + step]])
                distance[at : at + step, start : start + width] = part
        return distance
