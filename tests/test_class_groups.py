"""Groups of close classes: complete, equally large, close, the same on any number of ranks; and divisions that hold them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from dnc_dist.base.errors import InputError
from dnc_dist.base.exact import squared_distance
from dnc_dist.clustering import Division, DivisionRules, Features, GroupRules, check_groups, divide, spread_features
from dnc_dist.clustering.groups import class_groups
from dnc_dist.processes import distributed
from tests.spawn import spawn

FAMILIES, OF_FAMILY = 20, 6


def families(noise: float = 0.1, width: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit means (C, F) of classes that come in families of close ones, in random order; the family of each."""
    generator = np.random.default_rng(seed)
    family = generator.permutation(np.repeat(np.arange(FAMILIES), OF_FAMILY))
    means = generator.normal(size=(FAMILIES, width))[family] + noise * generator.normal(size=(len(family), width))
    return (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32), family


def rows_of(means: np.ndarray, per_class: int, noise: float = 0.05) -> tuple[torch.Tensor, np.ndarray]:
    """Unit features (N, F) of images around class means, and their labels; one class has a single image."""
    generator = np.random.default_rng(1)
    labels = np.repeat(np.arange(len(means)), per_class)[per_class - 1 :]
    rows = means[labels] + noise * generator.normal(size=(len(labels), means.shape[1]))
    return normalize(torch.from_numpy(rows).float(), dim=1), labels


def by_distance(means: np.ndarray, one: int) -> np.ndarray:
    """The other classes, the nearest first."""
    order = np.argsort(squared_distance(means, means[one]), kind="stable")
    return order[order != one]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 60), st.integers(1, 4), st.integers(2, 9), st.integers(0, 5), st.sampled_from([2, 7]))
def test_every_class_is_in_groups_of_its_learner(seed: int, classes: int, learners: int, n: int, skip: int, width: int) -> None:
    generator = np.random.default_rng(seed)
    means = np.round(generator.normal(size=(classes, width)), 1)  # some are equal
    learner = generator.integers(-1, learners, classes)
    trained = np.flatnonzero(learner >= 0)
    assume(len(trained))
    groups = class_groups(means, learner, GroupRules("groups", n, skip))
    assert sorted(groups[groups >= 0].tolist()) == trained.tolist()
    around = class_groups(means, learner, GroupRules("neighbours", n, skip))
    assert sorted(around[:, 0].tolist()) == trained.tolist()
    for line in [*groups, *around]:
        members = line[line >= 0]
        assert len(np.unique(learner[members])) == 1 and len(np.unique(members)) == len(members) <= n
    for a in range(learners):
        own = int((learner == a).sum())
        sizes = (groups[learner[groups[:, 0]] == a] >= 0).sum(1)
        if not skip:
            assert len(sizes) == -(-own // n)
            assert not own or np.ptp(sizes) <= 1
        assert all((line >= 0).sum() == min(n, own) for line in around if learner[line[0]] == a)


def test_groups_are_the_families() -> None:
    # Families are 20 times as far apart as their classes: 2-means with halves of the right sizes never cuts one.
    means, family = families(noise=0.02)
    groups = class_groups(means, np.zeros(len(means), int), GroupRules("groups", OF_FAMILY))
    assert groups.shape == (FAMILIES, OF_FAMILY)
    assert (family[groups] == family[groups[:, :1]]).mean() > 0.9

    # The six of a family stand together in their large group of 60, which is dealt out to ten groups.
    apart = class_groups(means, np.zeros(len(means), int), GroupRules("groups", OF_FAMILY, skip_nearest=OF_FAMILY))
    lines = [line[line >= 0] for line in apart]
    assert [len(line) for line in lines] == [6] * 20
    assert np.mean([len(np.unique(family[line])) == len(line) for line in lines]) > 0.5


@pytest.mark.parametrize("skip", [0, 3])
def test_neighbours_are_the_ranks_behind_those_that_are_skipped(skip: int) -> None:
    means, _ = families(noise=0.7)
    found = class_groups(means, np.zeros(len(means), int), GroupRules("neighbours", 5, skip))
    distance = np.sqrt(squared_distance(means[:, None], means[None]))
    for one in range(len(means)):
        expected = by_distance(means, one)[skip : skip + 4]
        # A mean is moved by half a unit of the grid in each of 24 columns at most; the largest distance is 2^10 units or more.
        moved = 4 * 0.5 * np.sqrt(24) * distance.max() / 2**10
        assert np.abs(distance[one, found[one, 1:]] - distance[one, expected]).max() <= moved
        assert found[one, 0] == one


def test_learners_take_whole_classes_and_leave_none_out() -> None:
    means, _ = families(noise=1.0)
    rows, labels = rows_of(means, 4, noise=0.6)
    published = divide(Features.alone(rows), labels, DivisionRules(4, mode="flat"), epoch=0)
    assert published.left_out > 1 and not published.groups.size
    for kind in ("groups", "neighbours"):
        made = divide(Features.alone(rows), labels, DivisionRules(4, mode="flat", groups=GroupRules(kind, 5)), epoch=0)  # type: ignore[arg-type]
        # Only the class of a single image has none to be compared with.
        assert made.left_out == 1 and made.learner_of[0] == -1
        learners = [np.unique(made.learner_of[labels == label]) for label in range(1, len(means))]
        assert all(len(found) == 1 for found in learners)
        assert made.fits(labels) and not made.fits(labels[1:]) and not made.fits(labels + 1)
        # Groups of two learners' classes (they stand learner by learner), and half of a class with another learner.
        across, moved = made.groups.copy(), made.learner_of.copy()
        across[[0, -1], 1] = across[[-1, 0], 1]
        moved[-1] = (moved[-1] + 1) % 4
        wrong = [replace(made, groups=across), replace(made, learner_of=moved)]
        if kind == "groups":  # a class without a group
            wrong.append(replace(made, groups=made.groups[1:]))
        assert not any(other.fits(labels) for other in wrong)
        assert len(np.unique(made.learner_of)) == 5
    alone = divide(Features.alone(rows), labels, DivisionRules(1, groups=GroupRules("groups", 5)), epoch=0)
    assert alone.num_learners == 1 and alone.left_out == 1 and len(alone.groups) == -(-(len(means) - 1) // 5)


def on_ranks(seed: int = 0) -> list[Division]:
    """Divisions of unevenly spread rows, a hierarchy and one learner; gathered, and not."""
    means, _ = families(noise=1.0, seed=seed)
    rows, labels = rows_of(means, 4, noise=0.6)
    cuts = [0, *(len(labels) * at * at // distributed.world_size() ** 2 for at in range(1, distributed.world_size() + 1))]
    start, stop = cuts[distributed.rank()], cuts[distributed.rank() + 1]
    found = []
    for replicated in (10_000, 0):
        features = spread_features(rows[start:stop], start, len(rows), replicated_rows=replicated)
        for rules in (DivisionRules(2, groups=GroupRules("groups", 5, 1)), DivisionRules(1, groups=GroupRules("neighbours", 5, 2))):
            first = divide(features, labels, rules, epoch=0)
            found += [first, divide(features, labels, rules, epoch=1, previous=first)]
    return found


def test_the_same_groups_on_any_number_of_ranks() -> None:
    alone = on_ranks()
    for found in spawn(on_ranks, 3):
        for got, expected in zip(found, alone, strict=True):
            for name, value in vars(expected).items():
                np.testing.assert_array_equal(getattr(got, name), value, err_msg=name)


def test_divisions_with_and_without_groups_are_read(tmp_path: Path) -> None:
    means, _ = families()
    rows, labels = rows_of(means, 3)
    made = divide(Features.alone(rows), labels, DivisionRules(1, groups=GroupRules("groups", 6)), epoch=0)
    torch.save(made.state_dict(), tmp_path / "state.pt")
    made.save(tmp_path / "division.npz")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for copy in (Division.from_state(state), Division.load(tmp_path / "division.npz")):
        np.testing.assert_array_equal(copy.groups, made.groups)
    # As versions without groups wrote them.
    del state["groups"]
    with np.load(tmp_path / "division.npz") as arrays:
        np.savez(tmp_path / "old.npz", **{name: arrays[name] for name in arrays if name != "groups"})
    for copy in (Division.from_state(state), Division.load(tmp_path / "old.npz")):
        assert copy.groups.size == 0
        np.testing.assert_array_equal(copy.learner_of, made.learner_of)
    with pytest.raises(InputError, match="groups is an array of float32"):
        Division.from_state(state | {"groups": torch.zeros(3, 3)})


def test_groups_of_all_classes_are_refused() -> None:
    labels = np.repeat(np.arange(10), 3)
    check_groups(labels, GroupRules("groups", 6, 3))
    with pytest.raises(InputError, match=r"neighbours.*a group has 6 classes and division.skip_nearest=4 passes over more.*only 10 with"):
        check_groups(labels, GroupRules("neighbours", 6, 4))
