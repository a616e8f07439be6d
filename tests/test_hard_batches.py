"""Batches of groups of classes, and of the whole set beside them: properties of the schedule of an epoch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dnc_dist.clustering.groups import GroupRules, class_groups
from dnc_dist.data.batching import EpochSchedule, epoch_schedule, is_hard

P, S = 4, 3


def one_learner(classes: int, per_class: int, n: int, kind: str = "groups") -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Labels of a set whose classes lie on a line, and groups of n neighbours on it."""
    means = np.stack([np.arange(classes) / classes, np.ones(classes)], 1)
    labels = np.repeat(np.arange(classes), per_class)
    return labels, class_groups(means, np.zeros(classes, int), GroupRules(kind, n))  # type: ignore[arg-type]


def schedule(
    labels: NDArray[np.int64], groups: NDArray[np.int32] | None, *, share: float = 1.0, epoch: int = 0, **more: int
) -> EpochSchedule:
    learner_of = np.zeros(len(labels), int)
    return epoch_schedule(
        learner_of, labels, seed=1, epoch=epoch, batch_size=P * S, samples_per_class=S, groups=groups, hard_share=share, **more
    )


def classes_of(made: EpochSchedule, labels: NDArray[np.int64]) -> list[list[int]]:
    return [sorted(set(labels[made[step].places].tolist())) for step in range(len(made))]


def test_a_batch_is_a_group() -> None:
    labels, groups = one_learner(48, 6, P)
    made = schedule(labels, groups)
    found = classes_of(made, labels)
    wanted = {tuple(sorted(group)) for group in groups.tolist()}
    assert {tuple(classes) for classes in found} <= wanted
    # 24 steps: every group twice, every image once.
    assert sorted(np.bincount(labels[made.places])) == [6] * 48 and len(np.unique(made.places)) == len(labels)
    assert found[:12] != classes_of(schedule(labels, groups, epoch=1), labels)[:12]


def test_small_groups_are_mixed_and_large_ones_cut() -> None:
    labels, pairs = one_learner(48, 6, 2)
    seen = set()
    for classes in classes_of(schedule(labels, pairs), labels):
        mine = [pair for pair in pairs.tolist() if set(pair) <= set(classes)]
        assert len(mine) == 2
        seen.add(frozenset(tuple(pair) for pair in mine))
    assert len(seen) > 12  # other pairs of pairs in the second pass
    labels, large = one_learner(48, 6, 3 * P)
    made = schedule(labels, large)
    for classes in classes_of(made, labels):
        assert any(set(classes) <= set(group) for group in large.tolist())
    assert sorted(np.bincount(labels[made.places])) == [6] * 48


def test_what_is_missing_comes_from_a_group_that_waits() -> None:
    # Groups of 3 of 4 classes: a batch has a whole one and a class of another, which then comes as a whole.
    labels, groups = one_learner(45, 6, 3)
    found = classes_of(schedule(labels, groups), labels)
    whole = [[group for group in groups.tolist() if set(group) <= set(classes)] for classes in found]
    assert all(len(groups) == 1 and len(classes) == P for groups, classes in zip(whole, found, strict=True))
    for (before, (now,)), classes in zip(pairwise(whole), found, strict=False):
        assert now != before[0]
        assert (set(classes) - set(before[0])) < set(now)
    # In 15 batches all of the 15 groups.
    assert len({tuple(groups[0]) for groups in whole[:15]}) == 15


def test_small_classes_leave_room_for_another_group() -> None:
    labels = np.repeat(np.arange(12), [2, 2, 2, 2] * 3)
    groups = np.arange(12, dtype=np.int32).reshape(3, 4)
    made = schedule(labels, groups)
    for step in range(len(made)):
        places = made[step].places
        assert len(places) == P * S == len(np.unique(places))
        assert any(set(group) <= set(labels[places].tolist()) for group in groups.tolist())


def test_neighbourhoods_show_every_class_in_a_pass() -> None:
    labels, groups = one_learner(60, 6, P, "neighbours")
    found = classes_of(schedule(labels, groups), labels)
    assert all(max(classes) - min(classes) < 2 * P for classes in found)
    # 30 batches of 4 show 60 classes once, if popular ones take up to half the room.
    assert set().union(*found) == set(range(60))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(20, 120),
    st.integers(3, 15),
    st.integers(1, 3),
    st.sampled_from([4, 8, 12]),
    st.integers(2, 4),
    st.integers(2, 8),
    st.sampled_from(["groups", "neighbours"]),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_properties(seed: int, rows: int, classes: int, learners: int, batch: int, per_class: int, n: int, kind: str, share: float) -> None:
    generator = np.random.default_rng(seed)
    labels = np.sort(generator.integers(classes, size=rows))
    counts = np.bincount(labels, minlength=classes)
    of_class = np.where(counts >= 2, generator.integers(learners, size=classes), -1)
    assume((of_class >= 0).any())
    learner_of = of_class[labels]
    groups = class_groups(generator.normal(size=(classes, 3)), of_class, GroupRules(kind, n, 1))  # type: ignore[arg-type]

    def make() -> EpochSchedule:
        return epoch_schedule(
            learner_of, labels, seed=seed, epoch=2, batch_size=batch, samples_per_class=per_class, groups=groups, hard_share=share
        )

    made, again = make(), make()
    assert all(np.array_equal(getattr(made, name), getattr(again, name)) for name in ("places", "starts", "turns", "sizes"))
    present = sorted(set(of_class[of_class >= 0].tolist()))
    turns = 2 * len(made) + np.arange(len(made))
    assert made.turns[:, 0].tolist() == [present[turn % len(present)] for turn in turns]
    for step, hard in enumerate(is_hard(turns, len(present), share)):
        places, (learner,) = made[step].places, made[step].learners
        assert len(np.unique(places)) == len(places) and (counts[labels[places]] >= 2).all()
        assert len(places) == min(batch, int((learner_of == learner).sum() if hard else (learner_of >= 0).sum()))
        if hard:
            assert (learner_of[places] == learner).all()


@pytest.mark.parametrize("learners", [1, 3, 4])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_hard_batches_are_spread_evenly(learners: int, share: float) -> None:
    turns = np.arange(40 * learners)
    hard = is_hard(turns, learners, share)
    for learner in range(learners):
        own = hard[learner::learners]
        assert abs(own.sum() - 40 * share) < 1
        assert all(abs(own[at : at + 10].sum() - 10 * share) <= 1 for at in range(30))
    # Not all learners at once: in any round of turns about this share, too.
    rounds = hard.reshape(40, learners).sum(1)
    assert np.abs(rounds - learners * share).max() < 1


def test_other_batches_are_of_the_whole_set_and_train_the_same_learner() -> None:
    labels = np.repeat(np.arange(16), 6)
    learner_of = np.where(np.arange(96) % 6 == 0, -1, labels // 8)  # of every class a row is left out

    def made(share: float) -> EpochSchedule:
        return epoch_schedule(learner_of, labels, seed=0, epoch=0, batch_size=P * S, samples_per_class=S, hard_share=share, length="over")

    published, mixed, whole = made(1.0), made(0.5), made(0.0)
    assert all(np.array_equal(published.turns, other.turns) for other in (mixed, whole))
    foreign = [[bool((learner_of[made[at].places] != made[at].learners[0]).any()) for at in range(len(made))] for made in (mixed, whole)]
    assert sum(foreign[0]) == len(mixed) // 2 and all(foreign[1])
    assert (learner_of[whole.places] < 0).any() and (learner_of[published.places] >= 0).all()
