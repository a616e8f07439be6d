"""Places of relevant rows that are counted, not listed: brute force as the oracle, with ties, small blocks, any roles and ranks."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from dnc_dist.base.exact import squared_distance
from dnc_dist.processes import distributed
from dnc_dist.retrieval import compared, gallery, places, products
from dnc_dist.retrieval.places import place_blocks
from dnc_dist.retrieval.products import TorchProducts
from dnc_dist.retrieval.protocols.base import silent
from tests.spawn import spawn

Found = dict[int, tuple[list[int], int, float]]
"""By query: the places of its relevant rows, and its nearest row with the distance."""


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Products by torch, as on a GPU; here the CPU computes them."""
    patch.setattr(compared, "products_on", lambda device: TorchProducts(torch.device("cpu")))


class Problem:
    """Rows of classes of different sizes, some with equal vectors; who asks and who is searched."""

    def __init__(self, seed: int, n: int = 150, dim: int = 8, noise: float = 1.0, kind: str = "plain", roles: str = "everyone") -> None:
        random = np.random.default_rng(seed)
        self.labels = np.minimum(random.integers(0, 25, n), random.integers(0, 25, n)) * 2**33
        self.labels[0] = -7  # a class of one row
        x = random.standard_normal((25, dim))[self.labels // 2**33] + noise * random.standard_normal((n, dim))
        if kind == "duplicates":
            x[random.permutation(n)[: n // 3]] = x[5]
        if kind == "equal":
            x[:] = x[5]
        if kind == "lattice":  # many equal distances between different vectors
            x = np.round(x)
        if kind == "collapsed":
            x = 1 + 1e-6 * x
        self.x = x.astype(np.float32)
        self.ids = 2**24 + 1 + 3 * random.permutation(n)
        first, second = random.random((2, n)) < 0.6
        self.asks = np.ones(n, bool) if roles == "everyone" else first
        self.searched = {"everyone": np.ones(n, bool), "apart": ~first, "overlapping": second}[roles]
        self.mutual = roles == "everyone"

    def relevant(self) -> np.ndarray:
        """(N, N) bool."""
        same = (self.labels[:, None] == self.labels) & self.asks[:, None] & self.searched
        np.fill_diagonal(same, False)
        return same

    def found(self, world: int = 1, rank: int = 0) -> Found:
        """What the rows of this rank find, of all queries with a relevant row."""
        owner = np.arange(len(self.ids)) ** 2 % 97 % world
        mine = np.flatnonzero(owner == rank)
        found: Found = {}
        relevant = self.relevant().sum(1)
        ticks: list[tuple[int, int]] = []
        for at, what in place_blocks(
            torch.from_numpy(self.x[mine]),
            self.ids[mine],
            self.labels[mine],
            asks=self.asks[mine],
            searched=self.searched[mine],
            most=int(relevant.max()),
            mutual=self.mutual,
            tick=lambda done, total: ticks.append((done, total)),
        ):
            for row, of_relevant, nearest, near in zip(mine[at], what.of_relevant, what.nearest, what.distance, strict=True):
                if r := relevant[row]:
                    # Beyond R only the first one is exact.
                    kept = [int(place) for number, place in enumerate(of_relevant[:r]) if number == 0 or place <= r]
                    found[int(self.ids[row])] = (kept, int(nearest), float(near))
        asking = int(self.asks.sum())
        assert ticks == sorted(ticks) and {total for _, total in ticks} == {asking} and ticks[-1][0] == asking
        return found

    def expected(self) -> Found:
        """The same by float64 differences to all rows, sorted by (float32 distance, row)."""
        found: Found = {}
        relevant = self.relevant()
        for row in np.flatnonzero(relevant.any(1)):
            rows = np.flatnonzero(self.searched & (np.arange(len(self.ids)) != row))
            distance = squared_distance(self.x[row], self.x[rows]).astype(np.float32)
            order = np.lexsort((self.ids[rows], distance))
            at = 1 + np.flatnonzero(relevant[row][rows[order]])
            kept = [int(place) for number, place in enumerate(at) if number == 0 or place <= len(at)]
            found[int(self.ids[row])] = (kept, int(self.ids[rows[order[0]]]), float(distance[order[0]]))
        return found


KINDS = ("plain", "duplicates", "equal", "lattice", "collapsed")
ROLES = ("everyone", "apart", "overlapping")


def in_small_blocks(patch: pytest.MonkeyPatch, tile: int = 16, own: int = 1 << 21) -> None:
    for module, name, value in (
        (products, "TILE", tile),
        (compared, "HITS", 50),
        (compared, "DIFFERENCES", 64),
        (gallery, "BLOCK_ELEMENTS", 200),
        (places, "OWN_ELEMENTS", own),
    ):
        patch.setattr(module, name, value)


@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gpu", [False, True])
def test_places_equal_brute_force(kind: str, roles: str, gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if gpu:
        as_on_a_gpu(monkeypatch)
    for seed, noise in enumerate((0.2, 1.0, 5.0)):
        problem = Problem(seed, noise=noise, kind=kind, roles=roles)
        expected = problem.expected()
        assert len(expected) > 50
        assert problem.found() == expected


@pytest.mark.parametrize("tile", [1, 16, 64])
@pytest.mark.parametrize("own", [0, 1 << 21])  # each product for one side, or for both
@pytest.mark.parametrize("gpu", [False, True])
def test_blocks_of_any_size_change_nothing(tile: int, own: int, gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if gpu:
        as_on_a_gpu(monkeypatch)
    problems = [Problem(seed, n=30 if tile == 1 else 150, kind=kind) for seed, kind in enumerate(("plain", "duplicates", "lattice"))]
    in_small_blocks(monkeypatch, tile, own)
    for problem in problems:
        assert problem.found() == problem.expected()


def test_far_first_matches_have_their_exact_place() -> None:
    problem = Problem(0, n=600, noise=20.0)
    found, expected = problem.found(), problem.expected()
    assert found == expected
    assert max(of_relevant[0] for of_relevant, _, _ in expected.values()) > 100


def on_ranks(gpu: bool = False) -> list[Found]:
    problems = [Problem(seed, kind=kind, roles=roles) for roles in ROLES for seed, kind in enumerate(("plain", "duplicates", "lattice"))]
    with pytest.MonkeyPatch.context() as patch:
        in_small_blocks(patch)
        if gpu:
            as_on_a_gpu(patch)
        found = [problem.found(distributed.world_size(), distributed.rank()) for problem in problems]
        # Ranks may hold nothing.
        found += [problem.found(1, distributed.rank()) for problem in problems[::3]]
    return found


@pytest.mark.parametrize(("world", "gpu"), [(2, False), (4, False), (2, True)])
def test_the_same_places_on_any_number_of_ranks(world: int, gpu: bool) -> None:
    alone, parts = on_ranks(), spawn(on_ranks, world, gpu)
    for number, expected in enumerate(alone):
        together: Found = {}
        for part in parts:
            assert not together.keys() & part[number].keys()
            together |= part[number]
        assert together == expected


def test_memory_does_not_grow_with_queries_x_gallery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "TILE", 128)
    monkeypatch.setattr(gallery, "BLOCK_ELEMENTS", 1 << 14)
    peaks = []
    for n in (1000, 3000):
        x = np.random.default_rng(0).standard_normal((n, 128)).astype(np.float32)
        everyone, ids = np.ones(n, bool), np.arange(n)
        tracemalloc.start()
        for _ in place_blocks(torch.from_numpy(x), ids, ids // 4, asks=everyone, searched=everyone, most=3, mutual=True, tick=silent):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # A few numbers for each row: its lists, norms and order; less than the vectors themselves.
    assert peaks[1] - peaks[0] < 2000 * 128 * 4
