"""The map of the test embedding: always the same images, so that one sees where each of them goes from evaluation to evaluation."""

from __future__ import annotations

import numpy as np

from dnc_dist.base.rng import numpy_generator
from dnc_dist.data.index import RowView
from dnc_dist.engine.evaluate import Evaluation
from dnc_dist.engine.subspaces import gather_queries
from dnc_dist.processes import distributed
from dnc_dist.rundir.folder import RunDirectory
from dnc_dist.rundir.maps import EmbeddingMap, save_map

MAPPED = 1000
"""Images on a map."""


def keep_map(view: RowView, found: Evaluation, run_dir: RunDirectory, step: int) -> EmbeddingMap:
    """Collective. The map of an evaluation, which rank 0 keeps in the run directory.

    Raises:
        RunError: somebody removed the run directory.
    """
    mapped = embedding_map(view, found)
    run_dir.check()
    if distributed.is_main():
        save_map(run_dir.path, step, mapped)
    return mapped


def embedding_map(view: RowView, found: Evaluation) -> EmbeddingMap:
    """Collective. Up to 1,000 queries in the plane in which their embeddings differ most; gallery images where no query has one answer.

    Which ones depends on the data set alone: they are the first of one random order of the whole view that were measured. An image that
    cannot be decoded makes room for one other.
    """
    queries = found.retrieval.queries
    measured = np.zeros(len(view), bool)
    measured[queries.rows if queries is not None and len(queries.rows) else np.flatnonzero(found.held.gallery)] = True
    order = numpy_generator("map", len(view)).permutation(len(view))
    chosen = gather_queries(found.held, np.sort(order[measured[order]][:MAPPED]))
    return EmbeddingMap(view.rows[chosen.rows], *principal_plane(chosen.embeddings.numpy()))


def principal_plane(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 2) float32 coordinates along the two directions in which embeddings (n, D) differ most, and the share (2,) of all variance.

    A direction has two signs; here its largest coordinate is positive.
    """
    points, share = np.zeros((len(embeddings), 2), np.float32), np.zeros(2, np.float32)
    if len(embeddings) == 0:
        return points, share
    centred = embeddings.astype(np.float64) - embeddings.mean(0, dtype=np.float64)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    points[:, : len(axes)] = centred @ axes.T
    share[: len(axes)] = values[:2] ** 2 / max(float((values**2).sum()), np.finfo(float).tiny)
    return points, share
