"""The two protocols of VehicleID, which are up to 18 points apart, on each of its test lists (small, medium, large).

``vehicleid-loo`` (metric learning): every image of a list queries all others of that list. ``vehicleid-random10``
(re-identification): one random image per vehicle is the gallery, all others are queries, 10 trials. With one right answer per
query, recall@k is what re-identification calls CMC@k, and ``map`` is the mean of 1 / place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dnc_dist.base.errors import InputError
from dnc_dist.base.rng import seed_for
from dnc_dist.retrieval.protocols import (
    SAMPLE_NEIGHBOURS,
    RetrievalResult,
    check_finite,
    evaluate,
    in_row_order,
    present_rows,
    sample_of,
)
from dnc_dist.retrieval.search import place_of_match, topk

TRIALS = 10
RECALL_AT = (1, 5)


def headline(lists: Collection[str]) -> str:
    """The list whose metrics stand for all: large, which published tables show."""
    return "large" if "large" in lists else next(iter(lists))


def evaluate_lists(
    embeddings_local: Tensor,
    rows_local: Tensor,
    labels: np.ndarray,
    lists: Mapping[str, np.ndarray],
    sources: Sequence[str],
    *,
    protocol: Literal["vehicleid-loo", "vehicleid-random10"],
    recall_at: tuple[int, ...] = RECALL_AT,
    sample: int = 24,
) -> dict[str, RetrievalResult]:
    """Collective. Exact retrieval metrics of each list on its own, from embeddings of the rows of all lists.

    Args:
        embeddings_local: (n, D) of this rank's rows; n may be 0.
        rows_local: (n,) int64 which rows these are; rows on no rank (undecodable) take no part.
        labels: (N,) int64 of all rows.
        lists: name -> (N,) bool; they may overlap.
        sources: (N,) what names an image everywhere: the galleries are drawn by it, not by the order in which data was prepared.
        protocol: which of the two.
        recall_at: the k of recall@k, besides the protocols' own 1 and 5.
        sample: how many queries of each list come back with their neighbours (of the first trial).

    Raises:
        InputError: no query of a list has a gallery row of its class.
        RunError: embeddings that are not finite.
    """
    check_finite(embeddings_local)
    at = tuple(sorted({*recall_at, *RECALL_AT}))
    everything, rows_local = np.ones(len(labels), bool), rows_local.cpu()
    drawn = draw_numbers(sources) if protocol == "vehicleid-random10" else None
    results = {}
    for name, members in lists.items():
        mine = torch.from_numpy(members)[rows_local]
        embeddings, rows = embeddings_local[mine.to(embeddings_local.device)], rows_local[mine]
        if drawn is None:
            found = evaluate(embeddings, rows, labels, everything, everything, protocol="leave-one-out", recall_at=at, sample=sample)
            results[name] = replace(found, protocol=protocol)
        else:
            results[name] = _random_galleries(name, embeddings, rows, labels, drawn, at, sample)
    return results


def draw_numbers(sources: Sequence[str]) -> np.ndarray:
    """(N, 10) int64: in each trial the image of a vehicle with the smallest number is its gallery image, whatever else is there."""
    numbers = [[seed_for("vehicleid-random10", trial, source) for trial in range(TRIALS)] for source in sources]
    return np.array(numbers, np.int64).reshape(-1, TRIALS)


def _gallery_of(labels: np.ndarray, present: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(N,) the gallery row of each row's class (the row itself if it is the one), -1 for rows that are not present."""
    order = np.lexsort((numbers, labels))
    order = order[present[order]]
    _, first, which = np.unique(labels[order], return_index=True, return_inverse=True)
    gallery_of = np.full(len(labels), -1)
    gallery_of[order] = order[first][which]
    return gallery_of


def _random_galleries(
    name: str, embeddings: Tensor, rows: Tensor, labels: np.ndarray, drawn: np.ndarray, recall_at: tuple[int, ...], sample: int
) -> RetrievalResult:
    """Collective. The trials on the rows of one list."""
    present = present_rows(rows, len(labels))
    num_gallery = len(np.unique(labels[present]))
    num_queries = int(present.sum()) - num_gallery
    if num_queries == 0:
        raise InputError(f"the list {name} has one image per vehicle, so there is nobody to ask; its vehicles need several images")
    values = np.empty((TRIALS, len(recall_at) + 1))
    for trial, numbers in enumerate(drawn.T):
        gallery_of = torch.from_numpy(_gallery_of(labels, present, numbers))
        offered = gallery_of[rows] == rows
        gallery, gallery_rows = embeddings[offered.to(embeddings.device)], rows[offered]
        queries, query_rows = embeddings[~offered.to(embeddings.device)], rows[~offered]
        place = place_of_match(queries, gallery_of[query_rows], gallery, gallery_rows)
        # In the order of the rows, so that the sums are the same sums whichever rank held what.
        all_rows, places = in_row_order(query_rows, place)
        values[trial] = [*((places <= k).mean() for k in recall_at), (1 / places).mean()]
        if trial == 0:
            shown = torch.from_numpy(np.isin(query_rows.numpy(), sample_of(all_rows, sample)))
            ids = query_rows[shown]
            near = topk(
                queries[shown.to(queries.device)], gallery, SAMPLE_NEIGHBOURS, query_ids=ids, gallery_ids=gallery_rows, exclude_self=False
            )
            sample_queries, neighbours = in_row_order(ids, near.ids)
            _, distances = in_row_order(ids, near.distance)
    trials = dict(zip([*(f"recall@{k}" for k in recall_at), "map"], values.T, strict=True))
    metrics = {key: float(value.mean()) for key, value in trials.items()}
    metrics |= {f"{key}_std": float(value.std(ddof=1)) for key, value in trials.items()}
    return RetrievalResult("vehicleid-random10", metrics, num_queries, num_gallery, 0, sample_queries, neighbours, distances, trials)
