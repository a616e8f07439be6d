"""Divisions: matching, hierarchy, trainable clusters, left-out rows, files, and any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dnc_dist.base.errors import InputError
from dnc_dist.clustering import Division, DivisionRules, Features, check_num_learners, divide, match, spread_features, whole
from dnc_dist.clustering.repair import class_sizes, repair
from dnc_dist.processes import distributed
from tests.spawn import spawn

GOLDEN = np.load(Path(__file__).parent / "golden" / "reference_values.npz")


def classes(num_classes: int, per_class: int, dim: int = 16, seed: int = 0, noise: float = 0.3) -> tuple[Tensor, np.ndarray]:
    """Features in eight groups of classes, labels in an order that mixes the classes."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_classes * per_class) % num_classes
    centre = torch.randn(8, dim, generator=random)[torch.arange(num_classes) % 8] + 0.5 * torch.randn(num_classes, dim, generator=random)
    features = centre[labels] + noise * torch.randn(len(labels), dim, generator=random)
    return torch.nn.functional.normalize(features, dim=1), labels.numpy()


def hierarchy(
    features: Tensor, labels: np.ndarray, target: int, divisions: int, *, start_at: str = "k-means++", replicated_rows: int = 10**6
) -> list[Division]:
    """Successive divisions of features that drift a little."""
    start, stop = distributed.local_range(len(labels))
    rules = DivisionRules(target, seed=1, start=start_at)  # type: ignore[arg-type]
    found: list[Division] = []
    for epoch in range(divisions):
        drift = 0.05 * epoch * torch.randn(features.shape, generator=torch.Generator().manual_seed(epoch))
        now = torch.nn.functional.normalize(features + drift, dim=1)[start:stop]
        spread = spread_features(now, start, len(labels), replicated_rows=replicated_rows)
        found.append(divide(spread, labels, rules, epoch=epoch, previous=found[-1] if found else None))
    return found


def flat(features: Tensor, labels: np.ndarray, target: int, *, previous: Division | None = None, trials: int = 30) -> Division:
    rules = DivisionRules(target, mode="flat", seed=2, trials=trials)
    return divide(Features.alone(features), labels, rules, epoch=0, previous=previous)


def assert_trainable(division: Division, labels: np.ndarray) -> None:
    for learner in range(division.num_learners):
        _, count = np.unique(labels[division.learner_of == learner], return_counts=True)
        assert len(count) >= 2
        assert count.min() >= 2
    assert division.sizes.tolist() == [int((division.learner_of == c).sum()) for c in range(division.num_learners)]
    assert division.left_out == int((division.learner_of == -1).sum()) == len(labels) - division.sizes.sum()


def test_match_gives_the_golden_relabelling() -> None:
    got = match(GOLDEN["reassign_previous"], GOLDEN["reassign_current"], 8)
    np.testing.assert_array_equal(got, GOLDEN["reassign_expected"])


@given(st.integers(2, 9), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_match_undoes_a_pure_relabelling(k: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    previous = np.concatenate([np.arange(k), random.integers(k, size=60)])
    renamed = random.permutation(k)[previous]
    np.testing.assert_array_equal(match(previous, renamed, k), previous)
    left_out = np.where(random.random(len(previous)) < 0.2, -1, previous)
    left_out[:k] = np.arange(k)
    np.testing.assert_array_equal(match(left_out, renamed, k), previous)


def test_the_hierarchy_doubles_and_children_come_from_their_parent() -> None:
    features, labels = classes(40, 12)
    divisions = hierarchy(features, labels, target=8, divisions=5)
    assert [d.num_learners for d in divisions] == [1, 2, 4, 8, 8]
    for division in divisions:
        assert_trainable(division, labels)
        assert division.learner_of.dtype == np.int16
    for before, after in pairwise(divisions[:4]):
        both = (before.learner_of >= 0) & (after.learner_of >= 0)
        kept = (after.learner_of[both] // 2 == before.learner_of[both]).mean()
        assert kept == pytest.approx(after.matched_share, abs=0.02)
        assert kept > 0.5
    assert divisions[0].matched_share == divisions[0].nmi_to_previous == 1
    assert 0.5 < divisions[-1].matched_share <= 1
    assert 0.5 < divisions[-1].nmi_to_previous <= 1
    steady = hierarchy(features, labels, target=8, divisions=5, start_at="previous")
    assert steady[-1].matched_share > max(0.8, divisions[-1].matched_share)


def test_the_same_features_give_the_same_learners() -> None:
    features, labels = classes(40, 12, noise=0.1)
    first = flat(features, labels, 4)
    again = flat(features, labels, 4, previous=first)
    assert again.matched_share == again.nmi_to_previous == 1
    np.testing.assert_array_equal(again.learner_of, first.learner_of)
    other_seed = divide(Features.alone(features), labels, DivisionRules(4, mode="flat", seed=77), epoch=2, previous=first)
    assert 0.25 < other_seed.matched_share <= 1
    np.testing.assert_allclose(first.centroids[0], features[first.learner_of == 0].mean(0), atol=0.05)
    inside = sum(float((features[first.learner_of == c] - torch.from_numpy(first.centroids[c])).square().sum()) for c in range(4))
    assert first.objective == pytest.approx(inside, rel=0.05)
    assert flat(features, labels, 1).num_learners == 1


def test_classes_with_one_row_in_the_cluster_are_left_out() -> None:
    labels = np.array([0, 0, 1, 1, 2])
    assert whole(labels).learner_of.tolist() == [0, 0, 0, 0, -1]
    assert whole(labels).left_out == 1
    features, labels = classes(24, 4, noise=1.0)
    division = flat(features, labels, 4)
    assert division.left_out > 0
    assert_trainable(division, labels)


@given(st.integers(0, 10_000), st.sampled_from([2, 4, 8]), st.integers(0, 12), st.integers(2, 5))
@settings(max_examples=12, deadline=None)
def test_every_learner_can_train_whatever_the_classes(seed: int, target: int, spare: int, per_class: int) -> None:
    random = np.random.default_rng(seed)
    count = 2 * target + spare
    labels = np.concatenate([np.repeat(np.arange(count), per_class), count + np.arange(random.integers(6))])
    features = torch.nn.functional.normalize(torch.from_numpy(random.standard_normal((len(labels), 5)).astype(np.float32)), dim=1)
    if seed % 3 == 0:
        features[1:] = features[0]
    previous = None
    for epoch in range(int(np.log2(target)) + 1):
        rules = DivisionRules(target, seed=seed, trials=2)
        previous = divide(Features.alone(features), labels, rules, epoch=epoch, previous=previous)
        assert_trainable(previous, labels)
    assert previous is not None
    assert previous.num_learners == target
    assert_trainable(flat(features, labels, target, trials=2), labels)


def test_a_cluster_of_one_class_is_dissolved_and_reported() -> None:
    features, labels = classes(10, 10)
    far = torch.zeros(20, 16)
    far[:, 0], far[:, 1] = -1.0, torch.linspace(-0.01, 0.01, 20)
    features, labels = torch.cat([0.1 * features, far]), np.append(labels, np.full(20, 10))
    division = flat(features, labels, 2, trials=3)
    assert division.trials == 3
    assert division.rejoined > 0
    assert_trainable(division, labels)


def test_repair_leaves_good_clusters_alone() -> None:
    features, labels = classes(12, 6)
    rows = Features.alone(features)
    cluster = np.where(labels < 6, 0, np.where(labels < 11, 1, 2))
    repaired = repair(rows, labels, cluster, torch.from_numpy(rows.means(cluster, 4)).float(), 4, 2)
    assert (class_sizes(repaired, labels).trainable(4) >= 2).all()
    assert np.bincount(class_sizes(repaired, labels).cluster).tolist() == np.bincount([*repaired[:12]]).tolist(), "a class was cut"
    assert repair(rows, labels, repaired, torch.zeros(4, 16), 4, 2) is repaired


def test_too_few_classes_are_refused() -> None:
    features, labels = classes(7, 3)
    with pytest.raises(InputError, match=r"division.num_learners=4 .* at most 3"):
        flat(features, labels, 4)
    with pytest.raises(InputError, match="0 classes"):
        check_num_learners(np.arange(5), 1)
    check_num_learners(labels, 3)


def test_a_division_survives_checkpoint_and_file(tmp_path: Path) -> None:
    features, labels = classes(20, 5)
    division = flat(features, labels, 4)
    torch.save(division.state_dict(), tmp_path / "state.pt")
    division.save(tmp_path / "division.npz")
    copies = Division.from_state(torch.load(tmp_path / "state.pt", weights_only=True)), Division.load(tmp_path / "division.npz")
    for copy in copies:
        for name, value in vars(division).items():
            np.testing.assert_array_equal(value, getattr(copy, name))
            assert type(value) is type(getattr(copy, name))
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []
    (tmp_path / "broken.npz").write_bytes((tmp_path / "division.npz").read_bytes()[:200])
    for name in ("broken.npz", "missing.npz"):
        with pytest.raises(InputError, match=name):
            Division.load(tmp_path / name)


def on_ranks() -> tuple[list[Division], list[Division], Division]:
    features, labels = classes(30, 10, noise=0.5)
    start, stop = (0, len(labels)) if distributed.rank() == distributed.world_size() - 1 else (0, 0)
    hard, hard_labels = classes(9, 3, noise=1.0)
    spread = spread_features(hard[start:stop], start, len(hard), replicated_rows=0)
    lopsided = divide(spread, hard_labels, DivisionRules(4, mode="flat", trials=2), epoch=3)
    return hierarchy(features, labels, 8, 4), hierarchy(features, labels, 4, 3, replicated_rows=0), lopsided


@pytest.mark.parametrize("world", [2, 4])
def test_the_same_divisions_on_any_number_of_ranks(world: int) -> None:
    alone = on_ranks()
    labels = classes(9, 3)[1]
    for replicated, spread, lopsided in spawn(on_ranks, world):
        for got, expected in zip(replicated + spread, alone[0] + alone[1], strict=True):
            assert got.state_dict().keys() == expected.state_dict().keys()
            for name, value in vars(expected).items():
                np.testing.assert_array_equal(getattr(got, name), value, err_msg=name)
        assert_trainable(lopsided, labels)
        np.testing.assert_array_equal(lopsided.learner_of, alone[2].learner_of)


class Abandoned(Exception):
    """What a vote raises."""


def interrupted() -> tuple[list[int], Division, int]:
    """A division that is abandoned at its first vote, then made again; it is asked on rank 1 only."""
    features, labels = classes(40, 20, noise=2.0)
    start, stop = distributed.local_range(len(labels))
    votes: list[int] = []

    def vote() -> None:
        votes.append(len(votes))
        if distributed.any_rank(distributed.rank() == 1 and len(votes) == 1):
            raise Abandoned

    def run(vote: Callable[[], None]) -> Division:
        spread = spread_features(features[start:stop], start, len(labels), replicated_rows=0, vote=vote)
        return divide(spread, labels, DivisionRules(4, mode="flat"), epoch=0)

    with pytest.raises(Abandoned):
        run(vote)
    before = distributed.traffic()["gather"]
    return votes, run(lambda: None), distributed.traffic()["gather"] - before


def test_an_abandoned_division_is_made_again_as_if_nothing_had_been() -> None:
    expected = interrupted_alone()
    for votes, division, gathered in spawn(interrupted, 2):
        assert votes == [0]
        np.testing.assert_array_equal(division.learner_of, expected.learner_of)
        # The sample that k-means++ starts on is all there is here; the clusters of rows travel as bytes.
        assert gathered < 400 * (16 * 4 + 8) + 400 * division.trials + 1000


def interrupted_alone() -> Division:
    features, labels = classes(40, 20, noise=2.0)
    return divide(Features.alone(features), labels, DivisionRules(4, mode="flat"), epoch=0)
