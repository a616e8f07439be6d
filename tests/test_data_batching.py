"""Properties of the schedule of an epoch."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dnc_dist.data.batching import EpochSchedule, epoch_schedule


def same(one: EpochSchedule, other: EpochSchedule) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("places", "starts", "turns", "sizes"))


def make_division(seed: int, num_rows: int, classes: int, learners: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    labels = np.sort(generator.integers(classes, size=num_rows))
    learner_of = generator.integers(-1, learners, size=num_rows)
    learner_of[0] = 0
    return learner_of, labels


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(1, 120),
    st.integers(1, 15),
    st.integers(1, 4),
    st.sampled_from([4, 8, 12]),
    st.integers(1, 5),
    st.integers(1, 2),
    st.sampled_from(["dataset", "over"]),
)
def test_properties(seed: int, num_rows: int, classes: int, learners: int, batch: int, per_class: int, m: int, length: str) -> None:
    learner_of, labels = make_division(seed, num_rows, classes, learners)

    def make() -> EpochSchedule:
        return epoch_schedule(
            learner_of,
            labels,
            seed=seed,
            epoch=3,
            batch_size=batch,
            samples_per_class=per_class,
            learners_per_step=m,
            length=length,  # type: ignore[arg-type]
        )

    schedule = make()
    assert same(schedule, make())
    with_rows = sorted(set(learner_of[learner_of >= 0].tolist()))
    m = min(m, len(with_rows))
    turns = np.zeros(learners, int)
    for number in range(len(schedule)):
        step = schedule[number]
        assert len(step.learners) == len(set(step.learners)) == m
        assert list(step.learners) == sorted(step.learners)
        assert len(np.unique(step.places)) == len(step.places)
        assert (learner_of[step.places] == step.learner).all()
        for learner in step.learners:
            turns[learner] += 1
            places = step.places[step.learner == learner]
            assert len(places) == min(batch // m, np.count_nonzero(learner_of == learner))
            assert (np.diff(labels[places]) >= 0).all()  # class by class
        # Canonical order, and ranks cut it without gap or overlap, whatever their number.
        assert (np.diff(step.learner) >= 0).all()
        for world in (1, 2, 3, 4, 5):
            ranges = [schedule.local_slots(number, rank, world) for rank in range(world)]
            assert np.concatenate([np.arange(*bounds) for bounds in ranges]).tolist() == list(range(len(step.places)))
    assert np.ptp(turns[with_rows]) <= 1
    if length == "dataset":
        assert len(schedule) == max(1, num_rows // batch)
    assert schedule.max_rows_per_class(labels) == max(np.bincount(labels[schedule[number].places]).max() for number in range(len(schedule)))


def test_yardstick_epoch_is_balanced() -> None:
    labels = np.repeat(np.arange(1009), 10)[:10084]
    schedule = epoch_schedule(np.zeros(10084, int), labels, seed=0, epoch=0, batch_size=128, samples_per_class=4)
    assert len(schedule) == 78
    for number in range(78):
        assert np.unique(labels[schedule[number].places], return_counts=True)[1].tolist() == [4] * 32
    # Every class and each of its rows is visited about equally often.
    assert np.ptp(np.bincount(labels[schedule.places], minlength=1009)) <= 4
    visits = np.bincount(schedule.places, minlength=10084)
    assert all(np.ptp(visits[labels == label]) <= 1 for label in range(1009))


def test_small_classes_fill_up() -> None:
    # Classes of 1 + 2 + 2 + 9 rows, 12 rows asked for: every class gives what it has, the large one the rest.
    labels = np.repeat([0, 1, 2, 3], [1, 2, 2, 9])
    schedule = epoch_schedule(np.zeros(14, int), labels, seed=0, epoch=0, batch_size=12, samples_per_class=3)
    assert np.bincount(labels[schedule[0].places]).tolist() == [1, 2, 2, 7]
    # A single missing row comes from a class that is there, not from one that would have no positive.
    labels = np.repeat(np.arange(6), 3)
    schedule = epoch_schedule(np.zeros(18, int), labels, seed=0, epoch=0, batch_size=7, samples_per_class=2)
    for number in range(len(schedule)):
        counts = np.bincount(labels[schedule[number].places], minlength=6)
        assert sorted(counts[counts > 0].tolist()) == [2, 2, 3]


def test_epoch_lengths() -> None:
    learner_of = np.repeat([0, 1, -1], [90, 25, 15])
    labels = np.arange(130) // 5

    def steps(length: str, m: int = 1) -> int:
        return len(
            epoch_schedule(
                learner_of,
                labels,
                seed=0,
                epoch=0,
                batch_size=20,
                samples_per_class=5,
                learners_per_step=m,
                length=length,  # type: ignore[arg-type]
            )
        )

    assert steps("dataset") == 6  # 130 // 20, the rows left out included
    assert steps("over") == 2 * 5  # 90 rows need 5 turns of 20
    assert steps("over", m=2) == 9  # turns of 10 rows, both learners in every step


def test_over_exhausts_the_largest_learner() -> None:
    learner_of, labels = np.repeat([0, 1], [96, 20]), np.arange(116) // 4
    schedule = epoch_schedule(learner_of, labels, seed=1, epoch=0, batch_size=16, samples_per_class=4, length="over")
    assert set(schedule.places[schedule.places < 96]) == set(range(96))


def test_epochs_differ_and_turns_go_on() -> None:
    learner_of, labels = make_division(0, 100, 10, 3)
    first, second = (epoch_schedule(learner_of, labels, seed=0, epoch=e, batch_size=20, samples_per_class=2) for e in (0, 1))
    assert not np.array_equal(first.places, second.places)
    assert (first.turns.ravel().tolist() + second.turns.ravel().tolist()) == [at % 3 for at in range(10)]


def test_groups_of_ranks_serve_one_learner() -> None:
    learner_of, labels = np.repeat([0, 1], [50, 5]), np.arange(55) // 5
    schedule = epoch_schedule(learner_of, labels, seed=0, epoch=0, batch_size=24, samples_per_class=4, learners_per_step=2)
    step = schedule[0]
    assert schedule.sizes[0].tolist() == [12, 5]  # the small learner gives all it has
    for rank in range(4):
        start, stop = schedule.local_slots(0, rank, 4)
        assert set(step.learner[start:stop]) == {rank // 2}
    assert schedule.local_slots(0, 1, 3) == (5, 11)  # 2 learners, 3 ranks: plain slices


def test_nothing_but_left_out_rows() -> None:
    with pytest.raises(ValueError, match="left out"):
        epoch_schedule(np.full(4, -1), np.zeros(4, int), seed=0, epoch=0, batch_size=2, samples_per_class=2)


def test_fast() -> None:
    learner_of, labels = make_division(0, 100_000, 11_000, 32)
    started = time.process_time()
    epoch_schedule(learner_of, labels, seed=0, epoch=0, batch_size=128, samples_per_class=4)
    assert time.process_time() - started < 3  # about half a second; a loop over rows would take minutes
