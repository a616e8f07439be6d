"""Searches for a few queries after an evaluation: in the subspace of every learner, and for the nearest image of their own class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnc_dist.model.masks.base import unit
from dnc_dist.processes import distributed
from dnc_dist.retrieval.search import Neighbours, topk

CHUNK_ELEMENTS = 1 << 24
"""Gallery rows (x D) that are projected into a subspace together."""


class Searched(NamedTuple):
    """The embeddings that were evaluated: those of this rank, and who of them is searched."""

    embeddings: Tensor  # (n, D) float32 of norm 1, on the CPU
    rows: Tensor  # (n,) int64 places of the view
    gallery: np.ndarray  # (N,) bool, of all rows


class Asking(NamedTuple):
    """Some queries, the same on all ranks, by row."""

    rows: np.ndarray  # (s,) int64 ascending
    embeddings: Tensor  # (s, D)

    def of(self, rows: np.ndarray) -> Asking:
        """Those of the given rows, in their order."""
        return Asking(rows, self.embeddings[torch.from_numpy(np.searchsorted(self.rows, rows))])


def gather_queries(held: Searched, rows: np.ndarray) -> Asking:
    """Collective. The embeddings of some rows (s,), ascending, which ranks hold."""
    mine = torch.from_numpy(np.isin(held.rows.numpy(), rows))
    device = distributed.device()
    every = distributed.gather_rows(held.rows[mine].to(device)).cpu()
    values = distributed.gather_rows(held.embeddings[mine].to(device)).cpu()
    order = torch.argsort(every)
    return Asking(every[order].numpy(), values[order])


def _search(asking: Asking, gallery: Tensor, ids: Tensor, k: int) -> Neighbours:
    """Collective. ``topk`` for queries that all ranks know, each of which asks for its part; (s, k) on every rank."""
    start, stop = distributed.local_range(len(asking.rows))
    own = torch.from_numpy(asking.rows[start:stop])
    near = topk(asking.embeddings[start:stop], gallery, k, query_ids=own, gallery_ids=ids, exclude_self=True)
    device = distributed.device()
    return Neighbours(*(distributed.gather_rows(part.to(device)).cpu() for part in near))


def nearest(held: Searched, asking: Asking, k: int) -> Neighbours:
    """Collective. The (s, k) nearest gallery rows of some queries in the whole embedding."""
    return _search(asking, held.embeddings, torch.where(torch.from_numpy(held.gallery)[held.rows], held.rows, -1), k)


def nearest_of_class(held: Searched, asking: Asking, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Collective. The (s,) nearest gallery row of each query's own class, -1 if there is none, and the squared distance (s,) to it."""
    rows, distance = np.full(len(asking.rows), -1), np.full(len(asking.rows), np.inf, np.float32)
    of_held = labels[held.rows.numpy()]
    for label in np.unique(labels[asking.rows]):
        ask = labels[asking.rows] == label
        inside = torch.from_numpy((of_held == label) & held.gallery[held.rows.numpy()])
        few = Asking(asking.rows[ask], asking.embeddings[torch.from_numpy(ask)])
        near = _search(few, held.embeddings[inside], held.rows[inside], 1)
        rows[ask], distance[ask] = near.ids[:, 0], near.distance[:, 0]
    return rows, distance


def right_alone(
    held: Searched, asking: Asking, masks: Tensor, labels: np.ndarray, done: Callable[[int], None] = lambda learner: None
) -> np.ndarray:
    """Collective. (s, k) bool: whether the nearest gallery row in each learner's subspace is of the query's class.

    Args:
        held: of all ranks.
        asking: the queries.
        masks: (k, D) at least 0.
        labels: (N,) int64 of all rows.
        done: told each learner that is through.
    """
    right = np.zeros((len(asking.rows), len(masks)), bool)
    for learner, mask in enumerate(masks.cpu()):
        # Coordinates that the learner does not use cost nothing; one that uses none has all images in one place.
        used = torch.nonzero(mask > 0).flatten() if (mask > 0).any() else torch.arange(1)
        projected = Asking(asking.rows, _project(asking.embeddings, mask, used))
        found, best = np.full(len(asking.rows), -1), np.full(len(asking.rows), np.inf, np.float32)
        for chunk, ids in _chunks(held, mask, used):
            near = _search(projected, chunk, ids, 1)
            row, distance = near.ids[:, 0].numpy(), near.distance[:, 0].numpy()
            better = (row >= 0) & ((distance < best) | ((distance == best) & (row < found)))
            found, best = np.where(better, row, found), np.where(better, distance, best)
        right[:, learner] = (found >= 0) & (labels[found] == labels[asking.rows])
        done(learner)
    return right


def _project(embeddings: Tensor, mask: Tensor, used: Tensor) -> Tensor:
    """(n, D) whole embeddings -> (n, d) in a learner's subspace: whatever the whole one was divided by, the norm here is 1 again."""
    return unit(embeddings[:, used] * mask[used])


def _chunks(held: Searched, mask: Tensor, used: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Collective. The gallery's projected rows and their ids, some after the others, equally often on every rank."""
    ids = torch.where(torch.from_numpy(held.gallery)[held.rows], held.rows, -1)
    step = max(1, CHUNK_ELEMENTS // held.embeddings.shape[1])
    most = int(distributed.gather_rows(torch.tensor([len(ids)], device=distributed.device())).max())
    for at in range(0, most, step):
        yield _project(held.embeddings[at : at + step], mask, used), ids[at : at + step]
