"""The parts of k-means whose digits are exact: sums in any order, the nearest centroid, the draws of k-means++."""

from __future__ import annotations

from collections import Counter, defaultdict
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch

from dnc_dist.base.exact import squared_distance
from dnc_dist.clustering.centroids import first_centroids, on_grid, plus_plus
from dnc_dist.clustering.features import Features
from dnc_dist.clustering.nearest import PROPOSALS, WORTH_SKIPPING, nearest_again, nearest_of
from dnc_dist.clustering.sums import Grid, GroupSums, energy, exponent_votes, highest_exponent
from tests.simulated_device import DEVICE, Device


def unit_rows(n: int, dim: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def brute(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return np.array([squared_distance(row, centroids).argmin() for row in x])


def test_sums_are_the_same_in_any_order_and_after_any_moves() -> None:
    random = np.random.default_rng(0)
    x, k, total = 3 * unit_rows(3000, 7) * 10.0 ** random.integers(-6, 1, (3000, 1)).astype(np.float32), 5, 3000
    exponent = highest_exponent(exponent_votes(float(np.abs(x).max())))
    assert np.abs(x).max() < 2.0**exponent <= 2 * np.abs(x).max()
    group = random.integers(k, size=len(x))

    def sums(rows: np.ndarray, *groups: np.ndarray) -> np.ndarray:
        part, before = GroupSums(x[rows], k, exponent, total), np.full(len(rows), -1)
        for now in groups:
            assert part.move(before, now[rows]) == (before != now[rows]).sum()
            before = now[rows]
        return part.values

    every = np.arange(len(x))
    once, wandering = sums(every, group), [random.integers(k, size=len(x)) for _ in range(4)]
    order = random.permutation(len(x))
    assert np.array_equal(sums(order, *wandering, group), once)
    assert np.array_equal(sum(sums(part, *wandering, group) for part in np.array_split(order, 7)), once)
    unit = 2.0 ** (exponent + total.bit_length() - 51)
    for g in range(k):
        exact = [sum(map(Fraction, column.tolist())) for column in x[group == g].T]
        assert np.abs(once[g] - np.array([float(value) for value in exact])).max() <= unit / 2 * (group == g).sum()
    parts = [energy(x[part], exponent, total) for part in np.array_split(order, 5)]
    assert sum(parts) == energy(x, exponent, total) == pytest.approx(float(np.square(x.astype(np.float64)).sum()), rel=1e-10)


def test_the_largest_value_of_all_ranks_decides_the_grid() -> None:
    votes = [exponent_votes(value) for value in (0.0, 0.7, 3.0, 2.0**-149, 3.4e38)]
    assert highest_exponent(votes[0]) == highest_exponent(np.zeros_like(votes[0]))
    assert [highest_exponent(vote) for vote in votes[1:]] == [0, 2, -148, 128]
    assert highest_exponent(votes[0] + votes[1] + votes[2] + votes[3]) == 2
    values = np.array([1.0, 2.0**-60, -1.0, 1 / 3])
    assert np.array_equal(Grid(0, 4).round(values.copy())[:3], [1, 0, -1])


@pytest.mark.parametrize("name", PROPOSALS)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-7, 1e18], ids=["unit", "collapsed", "one point", "huge"])
def test_the_nearest_is_the_argmin_of_float64(scale: float, name: str) -> None:
    """Also where float32 cannot tell: rows close to each other, centroids a unit of float32 apart, centroids twice."""
    x, random = unit_rows(400, 33), np.random.default_rng(1)
    x = (x * np.float32(scale) + np.float32(scale < 1)).astype(np.float32)
    centroids = x[random.integers(len(x), size=30)]
    centroids[10:20] = np.nextafter(centroids[:10], np.float32(np.inf))
    centroids[20:25] = centroids[:5]
    rows = random.integers(len(x), size=300)
    assert np.array_equal(nearest_of(x, rows, centroids, propose=PROPOSALS[name]), brute(x[rows], centroids))
    assert not nearest_of(x, rows, np.repeat(centroids[:1], 4, 0), propose=PROPOSALS[name]).any()
    assert nearest_of(x, rows[:0], centroids, propose=PROPOSALS[name]).shape == (0,)


def test_the_nearest_again_where_few_centroids_moved() -> None:
    x, random = unit_rows(1500, 9), np.random.default_rng(2)
    before = x[random.permutation(len(x))[: WORTH_SKIPPING + 200]]
    last = nearest_of(x, np.arange(len(x)), before)
    for few in (0, 1, 60, 199, 400):
        now = before.copy()
        moved = random.permutation(len(now))[:few]
        now[moved] = now[moved] + 0.2 * random.standard_normal((few, 9)).astype(np.float32)
        now[moved[: few // 4]] = before[random.integers(len(now), size=few // 4)]  # ties with others
        assert np.array_equal(nearest_again(x, last, before, now), brute(x, now))


def test_products_on_the_grid_are_exact() -> None:
    """The longest rows there can be, so that their sums of products are the largest."""
    for dim in (1, 512, 4096):
        x = np.sign(unit_rows(40, dim, seed=dim)) * np.float32(1.9)
        points = on_grid(torch.from_numpy(x), 0).numpy()
        assert np.array_equal(points, np.rint(points)) and (np.abs(points).astype(np.int64) ** 2).sum(1).max() < 1 << 23
        assert np.array_equal(points @ points.T, points.astype(np.int64) @ points.T.astype(np.int64))


def test_starts_are_drawn_by_squared_distance() -> None:
    """Drawing many at a time gives every set of four of six rows as often as drawing one after the other."""
    x, k, draws = np.array([[0, 0], [1, 0], [0, 3], [5, 5], [6, 5], [9, 0]], np.float32), 4, 2000
    rows, squares = torch.from_numpy(x), np.square(x[:, None] - x[None]).sum(2)
    expected: defaultdict[frozenset[int], float] = defaultdict(float)
    for order in permutations(range(len(x)), k):
        chance, nearest = 1 / len(x), squares[order[0]]
        for row in order[1:]:
            chance, nearest = chance * nearest[row] / nearest.sum(), np.minimum(nearest, squares[row])
        expected[frozenset(order)] += chance
    found = Counter(
        frozenset(np.flatnonzero((x[:, None] == plus_plus(rows, k, np.random.default_rng(seed)).numpy()).all(2).any(1)).tolist())
        for seed in range(draws)
    )
    assert sum(expected.values()) == pytest.approx(1)
    for rows, chance in expected.items():
        # Six standard deviations: 15 sets, no chance.
        assert abs(found[rows] - draws * chance) <= 6 * np.sqrt(draws * chance * (1 - chance)), rows


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-7, 1e18], ids=["unit", "collapsed", "one point", "huge"])
def test_starts_on_a_gpu_are_those_of_the_cpu(scale: float) -> None:
    """The way of a GPU: products in float64, other blocks. Rows stand twice, so that some draws have no choice but equal rows."""
    children = 6
    for seed in range(3):
        x = unit_rows(700, 33, seed)
        x[400:] = x[:300]
        x = (x * np.float32(scale) + np.float32(scale < 1)).astype(np.float32)
        parent = np.arange(len(x)) % 2
        for groups in (parent, 0 * parent):
            rows_of_parent = np.bincount(groups)
            given = (groups, rows_of_parent, children, seed)
            expected = first_centroids(Features.alone(torch.from_numpy(x)), *given)
            with Device():
                rows = torch.from_numpy(x).to(DEVICE)
                found = first_centroids(Features.alone(rows), *given)
                assert found.device == DEVICE
                assert torch.equal(found.cpu(), expected)


def test_a_start_on_a_gpu_reads_twice_a_round() -> None:
    x = torch.from_numpy(unit_rows(300, 9))
    rounds: list[int] = []  # these rows are one block, so it beats once a round
    with Device() as simulated:
        rows = x.to(DEVICE)
        simulated.forget()
        plus_plus(rows, 40, np.random.default_rng(0), lambda: rounds.append(0))
        reads = [what for _, what, _ in simulated.waits if not what.startswith("copy from")]
    assert 6 <= len(rounds) < 39  # a round at most doubles the centroids, and keeps more than one of many
    assert len(reads) == 1 + 2 * len(rounds)  # one for the grid


def test_starts_are_different_rows_while_there_are_any() -> None:
    x = unit_rows(500, 20)
    beats: list[int] = []
    start = plus_plus(torch.from_numpy(x), 400, np.random.default_rng(0), lambda: beats.append(0)).numpy()
    assert len(np.unique(start, axis=0)) == 400 and beats
    assert {*map(bytes, start)} <= {*map(bytes, x)}
    few = plus_plus(torch.from_numpy(np.repeat(x[:3], 5, 0)), 8, np.random.default_rng(0)).numpy()
    assert len(few) == 8 and len(np.unique(few, axis=0)) == 3
