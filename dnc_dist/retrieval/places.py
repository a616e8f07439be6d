"""At which places of its ranking a query has the rows of its class: counted, never listed; the same for any number of ranks.

The exact distances of a query to the rows of its class, which are few, come first; all other rows only have to be counted between
them (``compared.py``). A query forgets the rows of its class that cannot be among its first R any more, but for the first of all,
whose place decides recall@k for every k. Where all that asks is searched, and the reverse, one product serves both of its sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnc_dist.processes import distributed
from dnc_dist.retrieval.asked import Asked
from dnc_dist.retrieval.compared import Searched
from dnc_dist.retrieval.gallery import first_columns

VISITING_ELEMENTS = 1 << 21
OWN_ELEMENTS = 1 << 21
"""Bounds on the queries of all ranks that are under way (x D, or x 2 R), and on the lists (x R) that a rank keeps where products serve
both sides."""


class Places(NamedTuple):
    """What queries (q,) found; R is the largest number of relevant rows of any query."""

    of_relevant: np.ndarray  # (q, R) int64, from 1, nearest first: exact for the first one, and for all within the query's own R
    nearest: np.ndarray  # (q,) int64 row, of any class
    distance: np.ndarray  # (q,) float32 to it, squared


def place_blocks(
    vectors_local: Tensor,
    ids: np.ndarray,
    labels: np.ndarray,
    *,
    asks: np.ndarray,
    searched: np.ndarray,
    most: int,
    mutual: bool,
    tick: Callable[[int, int], None],
) -> Iterator[tuple[np.ndarray, Places]]:
    """Collective. The places of the relevant rows (of the query's label, itself excluded), some queries after the others.

    Args:
        vectors_local: (n, D) finite rows of this rank; n may be 0.
        ids: (n,) int64 global rows, no row on two ranks.
        labels: (n,) int64.
        asks: (n,) bool the queries among them.
        searched: (n,) bool the gallery among them.
        most: R, the largest number of relevant rows of any query of any rank.
        mutual: on every rank all queries are gallery, and all gallery are queries.
        tick: called with how many queries of all ranks are done, and of how many.

    Yields:
        Which of this rank's rows asked (q,), q maybe 0, and what they found; equally often on every rank.
    """
    gallery = Searched(vectors_local.detach().float().cpu().numpy(), np.where(searched, ids, -1), labels)
    order = gallery.at if mutual else np.flatnonzero(asks)
    ranks = distributed.gather_rows(torch.tensor([len(order)], device=distributed.device())).tolist()
    step = max(1, min(gallery.products.tile, VISITING_ELEMENTS // (len(ranks) * max(vectors_local.shape[1], 2 * most + 5))))
    blocks = [order[at : at + step] for at in range(0, max(ranks), step)]  # equally many on every rank
    if mutual and max(ranks) * most <= OWN_ELEMENTS:
        yield from _both_sides(gallery, blocks, ids, labels, most, partial(_tick, tick, ranks, step))
        return
    for number, at in enumerate(blocks):
        visitors, counts = _gather(gallery.vectors[at])
        asked = Asked.new(ids[at], labels[at], *_relevant(gallery, visitors, counts, ids[at], labels[at], most))
        visiting = _visit(asked, counts)
        gallery.serve(visitors, visiting)
        _take_answers(asked, visiting, counts)
        _tick(tick, ranks, step, number)
        yield at, _places(asked)


def _both_sides(
    gallery: Searched, blocks: list[np.ndarray], ids: np.ndarray, labels: np.ndarray, most: int, done: Callable[[int], None]
) -> Iterator[tuple[np.ndarray, Places]]:
    """Collective. ``place_blocks`` where every row of the gallery asks: while queries visit a rank, its own rows ask them in turn."""
    order = gallery.at
    known = []
    for at in blocks:
        visitors, counts = _gather(gallery.vectors[at])
        known.append(_relevant(gallery, visitors, counts, ids[at], labels[at], most))
    own = Asked.new(ids[order], labels[order], *(np.concatenate(part) for part in zip(*known, strict=True)))
    own.narrow()
    del known
    ends = np.cumsum([len(at) for at in blocks])
    parts = [slice(int(end) - len(at), int(end)) for at, end in zip(blocks, ends, strict=True)]
    for number, (at, part) in enumerate(zip(blocks, parts, strict=True)):
        visitors, counts = _gather(gallery.vectors[at])
        visiting = _visit(own.part(part), counts)
        gallery.exchange(visitors, visiting, counts, own, parts, number)
        _take_answers(own.part(part), visiting, counts)
        done(number)
    for at, part in zip(blocks, parts, strict=True):
        yield at, _places(own.part(part))


def _tick(tick: Callable[[int, int], None], ranks: list[int], step: int, number: int) -> None:
    """After a block of at most ``step`` queries of each rank, of which there are so many."""
    tick(sum(min(step * (number + 1), queries) for queries in ranks), sum(ranks))


def _gather(rows: np.ndarray, counts: list[int] | None = None) -> tuple[np.ndarray, list[int]]:
    """Collective. The rows of all ranks, and how many each has."""
    device = distributed.device()
    if counts is None:
        counts = distributed.gather_rows(torch.tensor([len(rows)], device=device)).tolist()
    return distributed.gather_rows(torch.from_numpy(rows).to(device), counts=counts).cpu().numpy(), counts


def _hand_back(rows: np.ndarray, counts: list[int]) -> np.ndarray:
    """Collective. (W, q, …): what every rank has for the queries of this one."""
    return distributed.exchange_rows(torch.from_numpy(rows).to(distributed.device()), counts).cpu().numpy()


def _relevant(
    gallery: Searched, visitors: np.ndarray, counts: list[int], ids: np.ndarray, labels: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Collective. The relevant rows (q, R) of this rank's queries and the exact distances (q, R) to them, nearest first."""
    who, _ = _gather(np.stack([ids, labels], axis=1), counts)
    found = (_hand_back(part, counts) for part in gallery.relevant(visitors, who[:, 0], who[:, 1], most))
    rows, distance = (part.swapaxes(0, 1).reshape(len(ids), len(counts) * most) for part in found)
    return first_columns(rows, distance, most)


def _visit(asked: Asked, counts: list[int]) -> Asked:
    """Collective. The queries of all ranks, with what is known of them so far."""
    asked.narrow()
    return Asked.unpacked(_gather(asked.packed(), counts)[0])


def _take_answers(asked: Asked, visiting: Asked, counts: list[int]) -> None:
    """Collective. Take in what all ranks found for the queries of this one."""
    asked.add(_hand_back(visiting.found(), counts))


def _places(asked: Asked) -> Places:
    return Places(asked.places(), asked.near_row, asked.near_distance)
