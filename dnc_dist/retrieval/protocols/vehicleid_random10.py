"""VehicleID as re-identification measures it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnc_dist.base.errors import InputError
from dnc_dist.base.rng import seed_for
from dnc_dist.retrieval.protocols.base import SAMPLE_NEIGHBOURS, Columns, RetrievalResult
from dnc_dist.retrieval.protocols.exact import in_row_order, present_rows, sample_of
from dnc_dist.retrieval.protocols.vehicleid import VehicleId
from dnc_dist.retrieval.search import place_of_match, topk

TRIALS = 10


class VehicleIdRandom10(VehicleId):
    """VehicleID for re-identification: one random image per vehicle is the gallery, all others ask, 10 trials (mean and deviation).

    The galleries are drawn by what names an image everywhere, not by the order in which data was prepared.
    """

    def parameters(self, recall_at: tuple[int, ...]) -> dict[str, Any]:
        return super().parameters(recall_at) | {"trials": TRIALS}

    def measure(self, embeddings: Tensor, rows: Tensor, columns: Columns, recall_at: tuple[int, ...]) -> dict[str, RetrievalResult]:
        self._drawn = draw_numbers(columns.sources())
        return super().measure(embeddings, rows, columns, recall_at)

    def measure_list(
        self,
        name: str,
        embeddings: Tensor,
        rows: Tensor,
        columns: Columns,
        recall_at: tuple[int, ...],
        tick: Callable[[int, int], None],
    ) -> RetrievalResult:
        return _measure(name, embeddings, rows, columns.labels, self._drawn, recall_at, tick)


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


def _measure(
    name: str,
    embeddings: Tensor,
    rows: Tensor,
    labels: np.ndarray,
    drawn: np.ndarray,
    recall_at: tuple[int, ...],
    tick: Callable[[int, int], None],
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
        place = place_of_match(queries, gallery_of[query_rows], gallery, gallery_rows, partial(_tick, tick, trial))
        # In the order of the rows, so that the sums are the same sums whichever rank held what.
        all_rows, places = in_row_order(query_rows, place)
        values[trial] = [*((places <= k).mean() for k in recall_at), (1 / places).mean()]
        if trial == 0:
            shown = torch.from_numpy(np.isin(query_rows.numpy(), sample_of(all_rows)))
            ids = query_rows[shown]
            near = topk(
                queries[shown.to(queries.device)], gallery, SAMPLE_NEIGHBOURS, query_ids=ids, gallery_ids=gallery_rows, exclude_self=False
            )
            sample_queries, neighbours = in_row_order(ids, near.ids)
            _, distances = in_row_order(ids, near.distance)
        tick(trial + 1, TRIALS)
    trials = dict(zip([*(f"recall@{k}" for k in recall_at), "map"], values.T, strict=True))
    metrics = {key: float(value.mean()) for key, value in trials.items()}
    metrics |= {f"{key}_std": float(value.std(ddof=1)) for key, value in trials.items()}
    return RetrievalResult("vehicleid-random10", metrics, num_queries, num_gallery, 0, sample_queries, neighbours, distances, trials)


def _tick(tick: Callable[[int, int], None], trial: int, done: int, total: int) -> None:
    """So much of a trial is done."""
    tick(trial * total + done, TRIALS * total)
