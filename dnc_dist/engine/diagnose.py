"""What an evaluation leaves for the report: neighbours of some queries, why others err, what division did, a map; in bounded size."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dnc_dist.base.errors import Stopped
from dnc_dist.base.progress import Progress
from dnc_dist.clustering.division import Division
from dnc_dist.data.index import RowView, text
from dnc_dist.engine.clusters import Clusters, clusters_now, last_division
from dnc_dist.engine.dataset import Passes, RunData
from dnc_dist.engine.evaluate import THUMBNAIL_SIDE, Evaluation
from dnc_dist.engine.mistakes import EXAMPLES, SHOWN, TWIN, Mistakes, distances_in_bars, find_mistakes, ranks_in_groups
from dnc_dist.engine.network import EmbeddingNetwork
from dnc_dist.engine.state import TrainState
from dnc_dist.engine.subspaces import Asking, gather_queries, nearest, nearest_of_class, right_alone
from dnc_dist.processes import distributed, watchdog
from dnc_dist.processes.signals import StopRequest
from dnc_dist.retrieval.protocols import Queries
from dnc_dist.rundir.diagnosis import MOST, Diagnosis, save_diagnosis
from dnc_dist.rundir.maps import EmbeddingMap

AGREEING = 5
"""Nearest rows of a query that all belong to one other class: its label is suspect."""
MAP_SIDE = 32
_log = logging.getLogger(__name__)


class _Looked(NamedTuple):
    """What was searched for: ``asking`` are all queries of it, ``shown`` those that may be shown."""

    asking: Asking
    alone: np.ndarray  # (s, k) bool
    shown: np.ndarray  # (w,) int64 places in ``Queries``, ascending
    near: np.ndarray  # (w, 5) int64 nearest rows
    own: np.ndarray  # (w,) int64 nearest row of the query's class
    own_distance: np.ndarray  # (w,) float32, squared


def diagnose(
    network: EmbeddingNetwork,
    data: RunData,
    view: RowView,
    found: Evaluation,
    mapped: EmbeddingMap,
    run_dir: Path,
    state: TrainState,
    *,
    stop: StopRequest,
    progress: Progress,
) -> None:
    """Collective. Write ``diagnosis.npz`` into the run directory; rank 0 writes.

    Args:
        network: that was evaluated.
        data: of the run.
        view: that it was evaluated on.
        found: by the evaluation.
        mapped: of the evaluation.
        run_dir: where to write.
        state: of the training; its division may be that of the conquer phase.
        stop: asked between searches.
        progress: of them.

    Raises:
        Stopped: a rank was asked to stop.
    """
    name = f"epoch {state.epoch}: diagnosis"
    division: Division | None = distributed.on_main(last_division, state.division, run_dir)
    if division is not None and division.num_learners > MOST["k"]:
        _log.info("the report shows no subspaces: it has room for %d learners, there are %d", MOST["k"], division.num_learners)
        division = None
    queries, labels = found.retrieval.queries or _nobody(), view.labels
    mistakes = find_mistakes(queries, labels)
    learners = 0 if division is None else division.num_learners
    with progress.phase(name, 2 + learners, "steps") as phase:

        def done(learner: int = 0) -> None:
            phase.update(1)
            watchdog.beat(name)
            if distributed.any_rank(stop.requested):
                raise Stopped(f"during {name}")

        watchdog.phase(name)
        # Of a protocol whose queries have no one answer only the map is left.
        shown = mistakes.shown()
        asking = gather_queries(found.held, queries.rows[np.unique(np.concatenate([mistakes.sampled, shown, mistakes.missed]))])
        few = asking.of(queries.rows[shown])
        near = nearest(found.held, few, AGREEING).ids.numpy()
        own, own_distance = nearest_of_class(found.held, few, labels)
        done()
        clusters, alone = None, np.zeros((len(asking.rows), learners), bool)
        if division is not None:
            clusters = clusters_now(network, data, division)
            if len(queries.rows):
                alone = right_alone(found.held, asking, clusters.masks, labels, done)
        if distributed.is_main():
            looked = _Looked(asking, alone, shown, near, own, own_distance)
            save_diagnosis(run_dir, _diagnosis(data, view, queries, mistakes, looked, clusters, mapped, state.step))
        done()


def _nobody() -> Queries:
    none = np.zeros(0, np.int64)
    return Queries(none, none, np.zeros(0), none, np.zeros(0, np.float32))


class _Pictures:
    """Rows of the index that are shown, numbered in the order in which they are first named."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """The pictures of rows of the index, of the same shape; -1 stays -1."""
        numbers = [self._numbers.setdefault(row, len(self._numbers)) if row >= 0 else -1 for row in rows.ravel().tolist()]
        return np.array(numbers, np.int64).reshape(rows.shape)

    @property
    def rows(self) -> np.ndarray:
        """(p,) int64."""
        return np.array(list(self._numbers), np.int64)


def _padded(lists: list[np.ndarray], width: int) -> np.ndarray:
    """(n, width) int64, -1 where a list is shorter."""
    table = np.full((len(lists), width), -1)
    for line, values in zip(table, lists, strict=True):
        line[: len(values)] = values
    return table


def _diagnosis(
    data: Passes,
    view: RowView,
    queries: Queries,
    mistakes: Mistakes,
    looked: _Looked,
    clusters: Clusters | None,
    mapped: EmbeddingMap,
    step: int,
) -> Diagnosis:
    """What is kept, with its pictures. Rank 0 only."""
    labels, index, pictures = view.labels, data.index, _Pictures()
    known = looked.near >= 0
    of_nearest = labels[queries.nearest[looked.shown]]
    agreeing = (known & (labels[looked.near] == of_nearest[:, None])).sum(1)
    suspect = looked.shown[(agreeing == AGREEING) & np.isin(looked.shown, mistakes.candidates)]
    mislabelled = mistakes.candidates[np.isin(mistakes.candidates, suspect)][:SHOWN]
    table = np.unique(
        np.concatenate([mistakes.worst, mistakes.alike, mislabelled, *mistakes.pair_examples, *mistakes.hub_examples]).astype(np.int64)
    )
    at = np.searchsorted(looked.shown, table)
    right = labels[queries.rows] == labels[queries.nearest]
    edges, bars = distances_in_bars(queries, labels)

    def misses(chosen: np.ndarray) -> np.ndarray:
        return np.searchsorted(table, chosen)

    def in_index(places: np.ndarray) -> np.ndarray:
        return np.where(places >= 0, view.rows[places], -1)

    def alone(rows: np.ndarray) -> np.ndarray:
        return looked.alone[np.searchsorted(looked.asking.rows, rows)]

    sampled = queries.rows[mistakes.sampled]
    embeddings = looked.asking.of(sampled).embeddings.numpy()
    learners = 0 if clusters is None else len(clusters.masks)
    dimension = looked.asking.embeddings.shape[1]
    shown_queries, shown_nearest, shown_own = (
        pictures(in_index(places)) for places in (queries.rows[table], queries.nearest[table], looked.own[at])
    )
    hubs = pictures(in_index(mistakes.hubs))
    montage = pictures(clusters.montage) if clusters is not None else np.zeros((0, 0), np.int64)

    def names(rows: np.ndarray) -> np.ndarray:
        return np.array([index.class_names[label] for label in index.columns["label"][rows]], dtype=np.str_)

    # Without learners there is nothing to sample for.
    some = slice(None) if learners else slice(0)
    return Diagnosis(
        counts=np.array([len(queries.rows), len(mistakes.misses)]),
        rank_counts=ranks_in_groups(queries),
        distance_edges=edges,
        distance_counts=bars,
        twins=np.array([(queries.distance[mistakes.misses] < TWIN**2).sum()]),
        rows=pictures.rows,
        labels=np.asarray(index.columns["label"][pictures.rows], np.int64),
        names=names(pictures.rows),
        sources=np.array([text(source) for source in index.columns["source"][pictures.rows]], dtype=np.str_),
        images=data.thumbnails(pictures.rows, THUMBNAIL_SIDE),
        queries=shown_queries,
        nearest=shown_nearest,
        distances=np.sqrt(queries.distance[table]),
        own=shown_own,
        own_distances=np.sqrt(np.where(looked.own[at] >= 0, looked.own_distance[at], 0)),
        first_hits=queries.first_hit[table],
        agreeing=np.stack([agreeing, known.sum(1)], 1)[at],
        alone=alone(queries.rows[table]),
        worst=misses(mistakes.worst),
        alike=misses(mistakes.alike),
        mislabelled=misses(mislabelled),
        pair_counts=mistakes.pair_counts,
        pair_queries=mistakes.pair_queries,
        pair_examples=_padded([misses(examples) for examples in mistakes.pair_examples], EXAMPLES),
        hubs=hubs,
        hub_counts=mistakes.hub_counts,
        hub_examples=_padded([misses(examples) for examples in mistakes.hub_examples], EXAMPLES),
        sampled_right=right[mistakes.sampled][some],
        sampled_alone=alone(sampled)[some],
        sampled_learner=(embeddings @ clusters.centres.T).argmax(1) if clusters is not None else np.zeros(0, np.int64),
        missed_alone=alone(queries.rows[mistakes.missed])[some],
        masks=clusters.masks.numpy() if clusters is not None else np.zeros((0, dimension), np.float32),
        clusters=clusters.facts if clusters is not None else np.zeros((0, 4), np.float32),
        montage=montage,
        map_rows=mapped.rows,
        map_points=mapped.points,
        map_labels=np.asarray(index.columns["label"][mapped.rows], np.int64),
        map_names=names(mapped.rows),
        map_right=np.isin(mapped.rows, view.rows[queries.rows[right]]) if len(queries.rows) else np.ones(len(mapped.rows), bool),
        map_images=data.thumbnails(mapped.rows, MAP_SIDE),
        map_variance=mapped.variance,
        map_step=np.array([step]),
    )
