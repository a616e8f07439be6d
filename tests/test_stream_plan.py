"""The plan of a streamed epoch, a pure function of the index: every row at most once, what is left counted, pools bounded, steps whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from dnc_dist.base.errors import InputError
from dnc_dist.data.stream_plan import StreamSchedule, cut_into_lanes, lanes_of_ranks, stream_schedule

IMAGE = 1000  # bytes, about


class Data:
    """A training set of classes with few images, divided among learners: most of a class has one learner."""

    def __init__(self, classes: int = 400, least: int = 2, most: int = 9, learners: int = 4, shards: int = 32) -> None:
        generator = np.random.default_rng(0)
        counts = generator.integers(least, most + 1, classes)
        self.labels = np.repeat(generator.permutation(classes), counts)
        border = np.flatnonzero(np.diff(self.labels, prepend=-1))
        shard_of_class = border * shards // len(self.labels)
        self.shards = np.repeat(shard_of_class, np.diff(border, append=len(self.labels)))
        self.sizes = generator.integers(IMAGE // 2, IMAGE * 3 // 2, len(self.labels))
        main, other = generator.integers(0, learners, (2, classes))
        self.learner_of = np.where(generator.random(len(self.labels)) < 0.8, main[self.labels], other[self.labels])
        # As a division does: a row alone in its class and cluster is left out.
        _, which, many = np.unique(self.labels * learners + self.learner_of, return_inverse=True, return_counts=True)
        self.learner_of[many[which] < 2] = -1

    def plan(self, **changes: int) -> StreamSchedule:
        options = {"seed": 0, "epoch": 0, "batch_size": 32, "samples_per_class": 4, "lanes": 16, "pool_bytes": 600 * IMAGE}
        return stream_schedule(self.learner_of, self.labels, self.shards, self.sizes, **(options | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data() -> Data:
    return Data()


def test_it_is_a_pure_function(data: Data) -> None:
    one, same, later, other = data.plan(), data.plan(), data.plan(epoch=1), data.plan(seed=1)
    assert np.array_equal(one.places, same.places) and np.array_equal(one.turns, same.turns)
    assert not np.array_equal(one.places, later.places) and not np.array_equal(one.places, other.places)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("samples", [2, 4])
def test_every_row_once_and_the_others_counted(data: Data, m: int, samples: int) -> None:
    plan = data.plan(learners_per_step=m, samples_per_class=samples)
    assert len(np.unique(plan.places)) == len(plan.places)
    wanted = np.flatnonzero(data.learner_of >= 0)
    assert np.array_equal(np.sort(np.concatenate(plan.reading)), wanted)
    assert len(plan.places) + plan.left_over == len(wanted)
    assert plan.left_over < len(wanted) / 10
    assert abs(len(plan) - len(wanted) // 32) <= len(plan) / 10


@pytest.mark.parametrize("m", [1, 2])
def test_a_step_is_of_its_learners_and_of_classes(data: Data, m: int) -> None:
    """Single-learner batches of classes by S: as an indexed epoch has them. A class never gives one row alone, S + 1 at most where classes
    are many, and each learner has two classes at least, so that every row has a positive and a negative."""
    plan = data.plan(learners_per_step=m)
    for number in range(len(plan)):
        step = plan[number]
        assert len(set(step.learners)) == m
        assert np.array_equal(data.learner_of[step.places], step.learner)
        assert len(step.places) <= 32
        for learner, size in zip(plan.turns[number], plan.sizes[number], strict=True):
            _, many = np.unique(data.labels[step.places[step.learner == learner]], return_counts=True)
            assert many.sum() == size and many.min() >= 2 and len(many) >= 2
    # Each learner may miss one row, which no class could give without leaving another one alone.
    whole = [number for number in range(len(plan)) if len(plan[number].places) >= 32 - m]
    assert len(whole) > 0.8 * len(plan)
    most = [np.unique(data.labels[plan[number].places], return_counts=True)[1].max() for number in whole]
    assert np.mean(np.array(most) <= 5 * m) > 0.9


def test_learners_take_turns_as_often_as_they_have_rows(data: Data) -> None:
    plan = data.plan()
    rows = np.bincount(data.learner_of[data.learner_of >= 0])
    used = np.bincount(data.learner_of[plan.places], minlength=len(rows))
    assert (used > 0.85 * rows).all()


def waiting_bytes(data: Data, plan: StreamSchedule, lane: int) -> list[int]:
    """Bytes that a reader of the lane holds after it read what a step needs, before it gives it away: what no step uses it drops."""
    step_of = np.full(len(data.labels), -1)
    step_of[plan.places] = np.repeat(np.arange(len(plan)), np.diff(plan.starts))
    places = plan.reading[lane]
    places = places[step_of[places] >= 0]
    found, read, waiting = [], 0, {}
    for step in range(len(plan)):
        mine = [int(place) for place in places if step_of[place] == step]
        while any(place not in waiting for place in mine):
            waiting[int(places[read])] = int(data.sizes[places[read]])
            read += 1
        found.append(sum(waiting.values()))
        for place in mine:
            del waiting[place]
    assert not waiting
    return found


@pytest.mark.parametrize("pool", [100, 600, 10_000])
def test_no_lane_holds_more_than_its_share_of_the_pool(data: Data, pool: int) -> None:
    plan = data.plan(pool_bytes=pool * IMAGE)
    most = max(max(waiting_bytes(data, plan, lane)) for lane in range(plan.lanes))
    assert most <= pool * IMAGE // plan.lanes
    if pool == 600:
        assert most > pool * IMAGE // plan.lanes // 2  # it is used, too


@pytest.mark.parametrize(("world", "m"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 1), (16, 2), (1, 2), (3, 2)])
def test_ranks_share_every_step(data: Data, world: int, m: int) -> None:
    plan = data.plan(learners_per_step=m)
    lanes = lanes_of_ranks(plan.lanes, world)
    for number in range(len(plan)):
        cuts = [plan.local_slots(number, rank, world) for rank in range(world)]
        assert cuts[0][0] == 0 and cuts[-1][1] == len(plan[number].places)
        assert all(before[1] == after[0] for before, after in pairwise(cuts))
        rows = plan.rows_of_world(number, world)
        assert rows == [max(stop - start, 1) for start, stop in cuts]
        of_slot = plan.lane_of_slot[plan.starts[number] : plan.starts[number + 1]]
        for rank, (start, stop) in enumerate(cuts):
            assert ((of_slot[start:stop] >= lanes[rank]) & (of_slot[start:stop] < lanes[rank + 1])).all()
            if m == 2 and world % 2 == 0:  # groups: each half of the ranks serves one learner
                half = rank // (world // 2)
                assert set(plan[number].learner[start:stop]) <= {plan.turns[number, half]}
                assert plan.rows_of_ranks(number, rank, world) == rows[half * world // 2 : (half + 1) * world // 2]
            else:
                assert plan.rows_of_ranks(number, rank, world) == rows


def test_ranks_have_about_as_many_rows() -> None:
    """With 20 classes for each rank, the largest rank of a step has about one class more than its share."""
    data = Data(classes=4000, learners=1)
    plan = data.plan(batch_size=320, lanes=64, pool_bytes=10**7)
    rows = np.array([plan.rows_of_world(step, 4) for step in range(len(plan))])[:-5]  # the last ones take what there is
    assert np.median(rows.max(1)) <= 320 / 4 + 2 * 5
    assert rows.max(1).mean() <= 1.1 * 320 / 4


@pytest.mark.parametrize("world", [2, 4, 8, 16])
def test_no_rank_has_much_more_than_twice_its_share(data: Data, world: int) -> None:
    """Also at the end, when the lanes of some ranks are through: memory of a GPU is not to run out in the last steps of an epoch."""
    plan = data.plan()
    assert max(max(plan.rows_of_world(step, world)) for step in range(len(plan))) <= 2 * 32 // world + 2 * 4


def test_lanes_are_cut_between_classes(data: Data) -> None:
    wanted = data.learner_of >= 0
    lanes = cut_into_lanes(data.shards, data.labels, wanted, 16, np.random.default_rng(0))
    classes = [set(data.labels[lane]) for lane in lanes]
    assert sum(map(len, classes)) == len(set.union(*classes))
    share = wanted.sum() / 16
    assert all(share - 9 <= len(lane) <= share + 9 for lane in lanes)
    for lane in lanes:  # within a shard from front to back
        same_shard = np.diff(data.shards[lane]) == 0
        assert (np.diff(lane)[same_shard] > 0).all()


def test_few_classes_are_filled_up_with_more_rows_of_each() -> None:
    """Five classes for a batch of 40 by 4: more of each, as an indexed epoch does."""
    data = Data(classes=5, least=40, most=60, learners=1, shards=5)
    plan = data.plan(batch_size=40, pool_bytes=10**7)
    assert len(plan[0].places) == 40
    assert np.unique(data.labels[plan[0].places], return_counts=True)[1].tolist() == [8] * 5


def test_a_pool_that_holds_no_batch_is_refused(data: Data) -> None:
    with pytest.raises(InputError, match=r"pools of 0\.0 MB in 16 lanes hold half a batch of 32 images for no learner"):
        data.plan(pool_bytes=1)


def test_words_about_the_epoch(data: Data) -> None:
    plan = data.plan()
    said = plan.summary(2, 32)
    assert said.startswith(f"{len(plan)} steps of {len(plan.places):,} images; {plan.left_over:,} (")
    most: NDArray[np.int64] = np.array([plan.rows_of_world(step, 2) for step in range(len(plan))])
    assert said.endswith(f"a rank has {most.max()} images of a step at most")
