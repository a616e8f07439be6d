"""Exact metrics over all queries of given roles: the same digits for any number of ranks. What most protocols stand on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.base.rng import numpy_generator
from dnc_dist.processes import distributed
from dnc_dist.retrieval.metrics import average_precision_at_r, r_precision
from dnc_dist.retrieval.places import place_blocks
from dnc_dist.retrieval.protocols.base import SAMPLE_NEIGHBOURS, Queries, RetrievalResult, silent
from dnc_dist.retrieval.search import topk

CHECKED_ROWS = 1 << 12
"""Embeddings that are looked at together: the masks of a check are as large as what they check."""


def evaluate(
    embeddings_local: Tensor,
    rows_local: Tensor,
    labels: np.ndarray,
    query: np.ndarray,
    gallery: np.ndarray,
    *,
    protocol: str,
    recall_at: tuple[int, ...] = (1, 2, 4, 8),
    sample: int = 24,
    tick: Callable[[int, int], None] = silent,
) -> RetrievalResult:
    """Collective. Exact retrieval metrics (recall@k; map@r and r_precision as Musgrave et al. 2020).

    Args:
        embeddings_local: (n, D) of this rank's rows, normalised or not; n may be 0.
        rows_local: (n,) int64 which rows these are; rows that are on no rank (undecodable) are neither query nor gallery.
        labels: (N,) int64 of all rows.
        query: (N,) bool: the rows that ask.
        gallery: (N,) bool: the rows that are searched; a row that is both does not find itself.
        protocol: the name of whose roles these are, for the result.
        recall_at: the k of recall@k.
        tick: called with how many queries of all ranks are done, and of how many.
        sample: how many queries come back with their neighbours; which ones does not depend on the embeddings.

    Raises:
        InputError: no query has a gallery row of its class.
        RunError: embeddings that are not finite.
    """
    rows_local = rows_local.cpu()
    check_finite(embeddings_local)
    present = present_rows(rows_local, len(labels))
    is_query, is_gallery = present & query, present & gallery
    relevant = _relevant(labels, is_query, is_gallery)
    asking = is_query & (relevant > 0)
    if not asking.any():
        raise InputError(
            f"none of the {is_query.sum()} queries has a gallery row of its class, so nothing can be retrieved; "
            f"let data.root name a set with several images per class"
        )
    rows = rows_local.numpy()
    found_rows, values = [np.empty(0, np.int64)], [np.empty((0, 5))]
    for at, found in place_blocks(
        embeddings_local,
        rows,
        labels[rows],
        asks=asking[rows],
        searched=is_gallery[rows],
        most=int(relevant[asking].max()),
        mutual=bool((is_query == is_gallery).all()),
        tick=tick,
    ):
        known = asking[rows[at]]
        query_rows, places = rows[at][known], found.of_relevant[known]
        r = relevant[query_rows]
        nearest = found.nearest[known], found.distance[known]
        # float64 holds whole numbers and float32 as they are.
        values.append(np.stack([places[:, 0], average_precision_at_r(places, r), r_precision(places, r), *nearest], axis=1))
        found_rows.append(query_rows)
    # In the order of the rows, so that the sums are the same sums whichever rank held what.
    all_rows, all_values = in_row_order(torch.from_numpy(np.concatenate(found_rows)), torch.from_numpy(np.concatenate(values)))
    first, average_precision, precision, nearest_row, nearest_distance = np.ascontiguousarray(all_values.T)
    metrics = {f"recall@{n}": int((first <= n).sum()) / len(first) for n in recall_at}
    metrics |= {"map@r": float(average_precision.mean()), "r_precision": float(precision.mean())}
    sampled = torch.from_numpy(np.isin(rows, sample_of(all_rows, sample)))
    near = topk(
        embeddings_local[sampled.to(embeddings_local.device)],
        embeddings_local,
        SAMPLE_NEIGHBOURS,
        query_ids=rows_local[sampled],
        gallery_ids=torch.from_numpy(np.where(is_gallery[rows], rows, -1)),
        exclude_self=True,
    )
    sample_queries, neighbours = in_row_order(rows_local[sampled], near.ids)
    _, distances = in_row_order(rows_local[sampled], near.distance)
    return RetrievalResult(
        protocol,
        metrics,
        num_queries=len(all_rows),
        num_gallery=int(is_gallery.sum()),
        num_left_out=int((is_query & (relevant == 0)).sum()),
        sample_queries=sample_queries,
        sample_neighbours=neighbours,
        sample_distances=distances,
        queries=Queries(
            all_rows,
            first.astype(np.int64),
            average_precision,
            nearest_row.astype(np.int64),
            nearest_distance.astype(np.float32),
        ),
    )


def sample_of(query_rows: np.ndarray, count: int = 24) -> np.ndarray:
    """Some of all queries (Q,), ascending, to look at; the embeddings have no say."""
    return np.sort(numpy_generator("retrieval sample", len(query_rows)).permutation(query_rows)[:count])


def check_finite(embeddings_local: Tensor) -> None:
    """Collective.

    Raises:
        RunError: an embedding of some rank is not finite.
    """
    bad = sum(int((~block.isfinite().all(1)).sum()) for block in embeddings_local.split(CHECKED_ROWS))
    if num_bad := int(distributed.all_reduce_sum(torch.tensor([bad], device=distributed.device()))):
        raise RunError(f"{num_bad} embeddings hold values that are not finite, so the model has diverged; lower optim.lr")


def present_rows(rows_local: Tensor, num_rows: int) -> np.ndarray:
    """Collective. (N,) bool: rows that some rank holds."""
    times = np.bincount(rows_local.numpy(), minlength=num_rows)
    times = distributed.all_reduce_sum(torch.from_numpy(times).to(distributed.device())).cpu().numpy()
    if len(times) > num_rows or times.max(initial=0) > 1:
        raise ValueError(f"every row below {num_rows} must be on one rank at most; {(times > 1).sum()} are there more than once")
    return times > 0


def _relevant(labels: np.ndarray, is_query: np.ndarray, is_gallery: np.ndarray) -> np.ndarray:
    """(N,) gallery rows of each query's class, itself excluded."""
    classes, label = np.unique(labels, return_inverse=True)
    per_class = np.bincount(label[is_gallery], minlength=len(classes))
    return np.where(is_query, per_class[label] - is_gallery, 0)


def in_row_order(rows: Tensor, values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Collective. The rows (n,) and values (n, …) of all ranks, by row."""
    device = distributed.device()
    all_rows = distributed.gather_rows(rows.to(device)).cpu().numpy()
    all_values = distributed.gather_rows(values.contiguous().to(device)).cpu().numpy()
    order = np.argsort(all_rows)
    return all_rows[order], all_values[order]
