"""Why a model errs: what is chosen of all queries, and the searches behind it, on any number of ranks."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from dnc_dist.engine import subspaces
from dnc_dist.engine.maps import principal_plane
from dnc_dist.engine.mistakes import (
    CANDIDATES,
    SAMPLED,
    SAMPLED_MISSES,
    SHOWN,
    distances_in_bars,
    find_mistakes,
    ranks_in_groups,
)
from dnc_dist.engine.subspaces import Searched, gather_queries, nearest, nearest_of_class, right_alone
from dnc_dist.processes import distributed
from dnc_dist.retrieval.protocols import Queries
from tests.spawn import spawn

# Eight images of classes 0, 0, 1, 1, 2, 2, 3, 3.
LABELS = np.repeat(np.arange(4), 2)


def queries(nearest: list[int], first: list[int], distance: list[float], precision: list[float] | None = None) -> Queries:
    count = len(nearest)
    found = precision if precision is not None else [float(hit == 1) for hit in first]
    squared = np.array(distance, np.float32) ** 2
    return Queries(np.arange(count), np.array(first, int), np.array(found, float), np.array(nearest, int), squared)


def test_classes_that_are_taken_for_each_other() -> None:
    # Image 2 (class 1) is nearest to three images of class 0 and 2; class 0 finds class 1 twice, class 1 finds class 0 once.
    found = find_mistakes(queries([2, 2, 0, 2, 2, 4, 7, 6], [3, 4, 5, 1, 6, 1, 1, 1], [0.3, 0.2, 0.4, 0.1, 0.5, 0.1, 0.1, 0.1]), LABELS)
    assert found.misses.tolist() == [0, 1, 2, 4]
    assert found.pairs.tolist() == [[0, 1], [2, 1]] and found.pair_counts.tolist() == [[2, 1], [1, 0]]
    assert found.pair_queries.tolist() == [[2, 2], [2, 2]]
    # The nearest of class 0 first; 0 and 2 found each other, which is shown once.
    assert [examples.tolist() for examples in found.pair_examples] == [[1, 0], [4]]


def test_the_first_example_of_a_pair_goes_the_usual_way() -> None:
    labels = np.repeat([0, 1], [2, 4])
    found = find_mistakes(queries([2, 0, 0, 1, 1, 1], [2] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), labels)
    assert found.pairs.tolist() == [[1, 0]] and found.pair_counts.tolist() == [[4, 1]]
    assert found.pair_examples[0].tolist() == [3, 0, 4, 5]


def test_hubs_are_images_that_many_queries_of_other_classes_find() -> None:
    found = find_mistakes(queries([2, 2, 3, 2, 2, 2, 7, 6], [2, 2, 1, 1, 2, 2, 1, 1], [0.4, 0.3, 0.1, 0.1, 0.2, 0.5, 0.1, 0.1]), LABELS)
    assert found.hubs.tolist() == [2]
    # Four queries of two other classes, and one of its own; examples of both classes come first, then the others by distance.
    assert found.hub_counts.tolist() == [[4, 2, 1]] and found.hub_examples[0].tolist() == [4, 1, 0, 5]


def test_the_worst_come_last_and_unlisted_ones_are_worst_of_all() -> None:
    found = find_mistakes(queries([2, 2, 0, 3, 6, 6, 4, 4], [9, 3, 0, 1, 0, 2, 2, 2], [0.5, 0.1, 0.4, 0.1, 0.2, 0.3, 0.3, 0.3]), LABELS)
    assert found.worst.tolist()[:4] == [4, 2, 0, 1]


def test_images_that_are_nearly_the_same_across_classes_are_told_once() -> None:
    distance = [0.001, 0.3, 0.001, 0.2, 0.25, 0.2, 0.9, 0.9]
    found = find_mistakes(queries([2, 0, 0, 2, 5, 4, 4, 7], [2, 1, 2, 1, 1, 1, 2, 1], distance), LABELS)
    # 0 and 2 found each other; 6 is farther from 4 than right images are from theirs.
    assert found.alike.tolist() == [0]


def test_only_queries_without_their_own_class_among_the_nearest_may_be_mislabelled() -> None:
    precision = [0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    found = find_mistakes(queries([2, 2, 0, 2, 5, 4, 7, 6], [5, 5, 2, 1, 1, 1, 1, 1], [0.4, 0.2, 0.1, *[0.1] * 5], precision), LABELS)
    assert found.candidates.tolist() == [1, 0]


def test_ranks_and_distances_count_every_query() -> None:
    found = queries([2, 2, 0, 2, 5, 4, 7, 6], [1, 2, 3, 5, 6, 100, 101, 0], [0.105, 0.4, 0.205, 0.3, 0.1, 0.1, 0.1, 0.1])
    assert ranks_in_groups(found).tolist() == [1, 1, 2, 1, 1, 1, 1]
    edges, bars = distances_in_bars(found, LABELS)
    assert bars.sum(1).tolist() == [5, 3] and np.flatnonzero(bars[1]).tolist() == [10, 20, 39] and edges[-1] == np.float32(0.4)


def test_nothing_grows_with_the_number_of_queries() -> None:
    count = 100_000
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 20, count)
    near, distance = generator.integers(0, count, count), generator.random(count).astype(np.float32)
    right = labels[near] == labels
    found = find_mistakes(Queries(np.arange(count), np.where(right, 1, 0), right.astype(float), near, distance), labels)
    assert len(found.shown()) <= 2 * SHOWN + CANDIDATES + 4 * (SHOWN + 8)
    assert (len(found.sampled), len(found.missed)) == (SAMPLED, SAMPLED_MISSES)
    assert not right[found.missed].any() and np.unique(found.sampled).size == SAMPLED


def test_without_misses_and_without_queries() -> None:
    for found in (
        find_mistakes(queries([1, 0, 3, 2, 5, 4, 7, 6], [1] * 8, [0.1] * 8), LABELS),
        find_mistakes(queries([], [], []), LABELS),
    ):
        assert not len(found.misses) and not len(found.shown()) and found.pairs.shape == (0, 2) and found.hub_counts.shape == (0, 3)


ROWS, DIM, LEARNERS = 60, 8, 3


def searches(*, chunk: int | None = None) -> tuple[np.ndarray, ...]:
    """Of embeddings that ranks hold in parts: what stands in the whole embedding and in every subspace."""
    if chunk is not None:
        subspaces.CHUNK_ELEMENTS = chunk
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(ROWS, DIM, generator=generator), dim=1)
    labels = np.arange(ROWS) % 6
    gallery = np.arange(ROWS) % 5 != 0
    masks = torch.rand(LEARNERS, DIM, generator=generator)
    masks[0, :5], masks[2] = 0, 0
    start, stop = distributed.local_range(ROWS)
    order = torch.arange(start, stop).flip(0)
    held = Searched(embeddings[order], order, gallery)
    asking = gather_queries(held, np.array([0, 3, 4, 17, 59]))
    near = nearest(held, asking, 4)
    own, own_distance = nearest_of_class(held, asking, labels)
    return (near.ids.numpy(), near.distance.numpy(), own, own_distance, right_alone(held, asking, masks, labels), asking.embeddings.numpy())


def expected() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same by hand: nearest rows, nearest of the class, right in each subspace."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(ROWS, DIM, generator=generator), dim=1).double()
    labels, rows = np.arange(ROWS) % 6, np.array([0, 3, 4, 17, 59])
    masks = torch.rand(LEARNERS, DIM, generator=generator).double()
    masks[0, :5], masks[2] = 0, 0
    never = (np.arange(ROWS) % 5 == 0) | (np.arange(ROWS) == rows[:, None])

    def distances(of: torch.Tensor) -> np.ndarray:
        return np.where(never, np.inf, (of[rows, None] - of[None]).square().sum(-1).numpy())

    whole = distances(embeddings)
    own = np.where(labels == labels[rows, None], whole, np.inf).argmin(1)
    alone = [labels[distances(torch.nn.functional.normalize(embeddings * mask, dim=1)).argmin(1)] == labels[rows] for mask in masks]
    return whole.argsort(1, kind="stable")[:, :4], own, np.stack(alone, 1)


@pytest.mark.parametrize("chunk", [None, 7 * DIM], ids=["one chunk", "seven rows a chunk"])
def test_searches_find_what_a_comparison_with_all_finds(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspaces, "CHUNK_ELEMENTS", chunk or subspaces.CHUNK_ELEMENTS)
    near, _, own, own_distance, alone, _ = searches()
    by_hand = expected()
    assert np.array_equal(near, by_hand[0]) and np.array_equal(own, by_hand[1]) and np.array_equal(alone, by_hand[2])
    assert np.isfinite(own_distance).all()


@pytest.mark.parametrize("world", [2, 3])
def test_searches_are_the_same_on_any_number_of_ranks(world: int) -> None:
    alone = searches()
    for rank in spawn(partial(searches, chunk=7 * DIM), world):
        for one, many in zip(alone, rank, strict=True):
            assert np.array_equal(one, many)


def test_a_class_without_a_gallery_row_has_no_nearest() -> None:
    embeddings = torch.eye(4)
    held = Searched(embeddings, torch.arange(4), np.array([False, True, True, True]))
    asking = gather_queries(held, np.array([0, 1]))
    rows, distance = nearest_of_class(held, asking, np.array([0, 1, 1, 2]))
    assert rows.tolist() == [-1, 2] and distance[0] == np.inf and distance[1] == 2


def test_the_plane_is_that_of_largest_variance() -> None:
    generator = np.random.default_rng(0)
    wide = generator.normal(size=(200, 2)) * [3, 2]
    embeddings = np.concatenate([wide, 0.01 * generator.normal(size=(200, 4))], 1).astype(np.float32)
    points, share = principal_plane(embeddings)
    # Distances in the plane are those of the two wide directions, but for the narrow ones.
    assert np.allclose(np.linalg.norm(points[1:] - points[0], axis=1), np.linalg.norm(wide[1:] - wide[0], axis=1), atol=0.2)
    assert share.sum() > 0.999 and share[0] > share[1]
    assert np.array_equal(principal_plane(-embeddings)[1], share)
    assert principal_plane(np.ones((3, 1), np.float32))[0].tolist() == [[0, 0]] * 3
