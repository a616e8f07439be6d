"""What a finished run has to show beside its curves: pictures, tables with pictures, histograms, the map; of its own files alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dnc_dist.report import names
from dnc_dist.report.subspaces import own_recall
from dnc_dist.rundir.diagnosis import Diagnosis, load_diagnosis
from dnc_dist.rundir.gallery import PictureGallery, load_gallery
from dnc_dist.trackers.drawing import beside, heat_map, neighbour_sheet
from dnc_dist.trackers.panels import Histogram, Panel, Picture, Scatter, Table

NEIGHBOURS = 8
"""Of a query, in the table."""


def panels_of(run_dir: Path) -> Iterator[Panel]:
    """All panels of a run directory, always in the same order; none of what the last evaluation has not left.

    Raises:
        InputError: a file of it is damaged.
    """
    if (gallery := load_gallery(run_dir)) is not None:
        yield from _neighbours(gallery)
    if (found := load_diagnosis(run_dir)) is not None:
        yield from _mistakes(found)
        yield from _learners(found)
        yield _map(found)


def _neighbours(gallery: PictureGallery) -> Iterator[Panel]:
    right, count = int(gallery.correct()[:, 0].sum()), len(gallery.query_rows)
    words = f"{count} queries, drawn at random, and their nearest images; for {right} of them the nearest is of the same class"
    yield Picture("neighbours/sheet", neighbour_sheet(gallery), f"{words}. Green frame: same class as the query; red: another.")
    shown = min(NEIGHBOURS, gallery.neighbour_rows.shape[1])
    columns = ["query", "class", "nearest is right"]
    columns += [f"{what}{place}" for place in range(1, shown + 1) for what in ("neighbour ", "class ", "distance ")]
    rows = []
    for query, correct in enumerate(gallery.correct()):
        row: list[Any] = [gallery.query_images[query], names.shown(gallery.name(int(gallery.query_labels[query]))), bool(correct[0])]
        for place in range(shown):
            if gallery.neighbour_rows[query, place] < 0:
                row += [None, None, None]
            else:
                name = names.shown(gallery.name(int(gallery.neighbour_labels[query, place])))
                row += [gallery.neighbour_images[query, place], name, float(gallery.distances[query, place])]
        rows.append(row)
    yield Table("neighbours/queries", columns, rows, words)


def _mistakes(found: Diagnosis) -> Iterator[Panel]:
    for what, counts in zip(("right", "wrong"), found.distance_counts, strict=True):
        yield Histogram(
            f"mistakes/distance_{what}", counts, found.distance_edges, f"Distance to the nearest image of queries where that is {what}"
        )
    lists = {"worst query": found.worst, "suspected wrong label": found.mislabelled, "nearly the same image": found.alike}
    columns = ["list", "query", "class", "file", "found", "found class", "found file", "distance"]
    columns += ["should be", "should be file", "its distance", "its rank"]
    rows = [[kind, *_miss(found, int(miss))] for kind, misses in lists.items() for miss in misses]
    if rows:
        yield Table(
            "mistakes/queries", columns, rows, "Queries whose nearest image is of another class, the most remarkable of each list first"
        )
    if len(found.pair_counts):
        columns = ["class a", "class b", "queries of a that found b", "of all of a", "queries of b that found a", "of all of b", "examples"]
        rows = [_confusion(found, pair) for pair in range(len(found.pair_counts))]
        yield Table(
            "mistakes/confusions",
            columns,
            rows,
            "Classes that are taken for each other most often; examples: query left, what it found right",
        )


def _miss(found: Diagnosis, miss: int) -> list[Any]:
    """A miss: the query, what it found, what it should have found."""
    query, nearest, own = (int(pictures[miss]) for pictures in (found.queries, found.nearest, found.own))
    cells = [*_picture(found, query), *_picture(found, nearest), float(found.distances[miss])]
    if own < 0:
        return [*cells, None, None, None, None]
    rank = int(found.first_hits[miss])
    return [*cells, found.images[own], str(found.sources[own]), float(found.own_distances[miss]), rank or None]


def _picture(found: Diagnosis, number: int) -> list[Any]:
    return [found.images[number], names.full(str(found.names[number])), str(found.sources[number])]


def _confusion(found: Diagnosis, pair: int) -> list[Any]:
    misses = [int(miss) for miss in found.pair_examples[pair] if miss >= 0]
    # The first example is of a query of class a.
    first, second = (str(found.names[pictures[misses[0]]]) for pictures in (found.queries, found.nearest))
    (there, back), (of_first, of_second) = found.pair_counts[pair].tolist(), found.pair_queries[pair].tolist()
    pictures = [found.images[number] for miss in misses for number in (int(found.queries[miss]), int(found.nearest[miss]))]
    shares = there / max(1, of_first), back / max(1, of_second)
    return [names.full(first), names.full(second), there, shares[0], back, shares[1], beside(pictures, apart=2)]


def _learners(found: Diagnosis) -> Iterator[Panel]:
    if not found.num_learners:
        return
    yield Picture("learners/masks", heat_map(found.masks), _masks_in_words(found.masks))
    columns = ["learner", "images", "classes", "classes mostly here", "share of an image's class that is here"]
    columns += ["recall@1 alone", "recall@1 alone, its own queries", "recall@1 of the whole, its own queries", "images of its cluster"]
    own = own_recall(found)
    rows: list[list[Any]] = []
    for learner, (images, classes, main, share) in enumerate(found.clusters.tolist()):
        alone = float(found.sampled_alone[:, learner].mean()) if len(found.sampled_alone) else None
        pictures = [found.images[number] for number in found.montage[learner] if number >= 0]
        of_own = [None if np.isnan(value) else float(value) for value in own[learner, :2]]
        rows.append([learner, int(images), int(classes), int(main), share, alone, *of_own, beside(pictures) if pictures else None])
    yield Table("learners/clusters", columns, rows, "Each learner: its cluster of training images, and what its subspace finds alone")


def _masks_in_words(masks: np.ndarray) -> str:
    words = "How much each learner uses each coordinate of the embedding: the darker, the more"
    if len(masks) < 2:
        return f"{words}."
    unit = masks / np.maximum(np.linalg.norm(masks, axis=1, keepdims=True), 1e-12)
    cosine = float((unit @ unit.T)[np.triu_indices(len(masks), 1)].mean())
    return f"{words}. Mean cosine between two learners' masks: {cosine:.2f} (1: the same subspace; 0: no coordinate in common)."


def _map(found: Diagnosis) -> Panel:
    shares = found.map_variance
    words = (
        f"{len(found.map_points)} images of the test, along the two directions in which their embeddings differ most "
        f"({shares[0]:.0%} and {shares[1]:.0%} of the variance)"
    )
    classes = [names.shown(str(name)) for name in found.map_names]
    return Scatter("map/embedding", found.map_points, classes, found.map_right, words)
