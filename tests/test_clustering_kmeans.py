"""k-means: against FAISS and brute force, with empty clusters, ties and parents, on rows spread over ranks."""

from __future__ import annotations

from itertools import pairwise

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.clustering import Features, KMeansOptions, KMeansResult, kmeans
from dnc_dist.clustering.kmeans import nearest
from dnc_dist.processes import distributed
from tests.rounding import EPS
from tests.spawn import spawn


def blobs(n: int, dim: int = 12, centres: int = 9, noise: float = 0.4, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(centres, dim, generator=random)[torch.randint(centres, (n,), generator=random)]
    return torch.nn.functional.normalize(x + noise * torch.randn(n, dim, generator=random), dim=1)


def brute(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    distance, assignment = (x.double()[:, None] - centroids.double()[None]).square().sum(2).min(1)
    return distance, assignment


TO_THE_END = KMeansOptions(tolerance=0)

# What fp32 makes of the squared distance of two rows of 12 values and length 1, by their norms and their product.
CLOSE = 4 * 12 * EPS


def assert_nearest(x: Tensor, result: KMeansResult) -> Tensor:
    """Every row is at its nearest centroid, or at one that fp32 cannot tell from it; returns its exact distance (n,)."""
    chosen = (x.double() - result.centroids.double()[result.assignment]).square().sum(1)
    scale = x.double().square().sum(1) + result.centroids.double().square().sum(1).max()
    assert (chosen - brute(x, result.centroids)[0] <= CLOSE * scale).all()
    assert ((result.distance - chosen).abs() <= CLOSE * scale).all()
    return chosen


@pytest.mark.parametrize(("n", "k"), [(3000, 4), (3000, 32), (500, 1), (9, 9)])
def test_the_assignment_is_the_argmin_for_the_returned_centroids(n: int, k: int) -> None:
    x = blobs(n)
    for iterations in (0, 3, 100):
        result = kmeans(Features.alone(x), k, seed=1, options=KMeansOptions(iterations))
        assert result.objective == pytest.approx(float(assert_nearest(x, result).sum()), rel=1e-9, abs=1e-9)


def test_faiss_and_numpy_give_the_same_bits() -> None:
    x = Features.alone(blobs(3000, dim=64, noise=1.0))
    parent = kmeans(x, 4, seed=3).assignment
    for k, restrict in ((16, None), (8, parent)):
        one, other = (kmeans(x, k, seed=3, options=KMeansOptions(backend=name), restrict=restrict) for name in ("faiss", "numpy"))
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))


def test_same_objective_as_faiss_from_the_same_start() -> None:
    x, k = blobs(4000, dim=16), 7
    start = x[torch.arange(k) * 100]
    peer = faiss.Kmeans(16, k, niter=100, max_points_per_centroid=10**7)
    peer.train(x.numpy(), init_centroids=start.numpy())
    peer_objective, _ = brute(x, torch.from_numpy(peer.centroids))
    ours = kmeans(Features.alone(x), k, seed=0, init=start, options=TO_THE_END)
    assert ours.iterations < 100, "did not converge"
    assert ours.objective == pytest.approx(float(peer_objective.sum()), rel=1e-6)
    assert kmeans(Features.alone(x), k, seed=0, init=ours.centroids).iterations == 1


def test_the_objective_never_grows_and_the_start_spreads_out() -> None:
    x = blobs(2000, noise=0.05)
    history = [kmeans(Features.alone(x), 9, seed=3, options=KMeansOptions(i, tolerance=0)).objective for i in range(8)]
    assert all(a >= b - 1e-9 for a, b in pairwise(history))
    random_start = kmeans(Features.alone(x), 9, seed=3, init=x[:9], options=KMeansOptions(0)).objective
    assert history[0] < random_start
    assert kmeans(Features.alone(x), 9, seed=3).objective == kmeans(Features.alone(x), 9, seed=3).objective


def test_empty_clusters_get_half_of_another() -> None:
    x = blobs(400)
    start = torch.cat([x[:2], torch.full((3, 12), 50.0)])
    result = kmeans(Features.alone(x), 5, seed=0, init=start)
    assert result.splits >= 3
    assert (torch.bincount(result.assignment, minlength=5) > 0).all()


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_identical_rows_fill_the_first_cluster_and_end(value: float) -> None:
    result = kmeans(Features.alone(torch.full((50, 8), value)), 3, seed=0)
    assert result.objective == pytest.approx(0, abs=1e-9)
    assert_nearest(torch.full((50, 8), value), result)


def test_more_clusters_than_distinct_rows() -> None:
    x = torch.eye(4).repeat(10, 1)
    result = kmeans(Features.alone(x), 8, seed=0)
    assert result.objective == pytest.approx(0, abs=1e-5)
    assert_nearest(x, result)


def test_equal_centroids_give_the_lowest_index() -> None:
    x = blobs(300)
    assert torch.equal(nearest(x, x[:1].repeat(5, 1)), torch.zeros(300, dtype=torch.int64))
    twice = torch.cat([x[:6], x[:6]])
    assert int(nearest(x, twice).max()) < 6
    assert torch.equal(nearest(x[:0], twice), torch.zeros(0, dtype=torch.int64))


def test_restricted_rows_choose_between_the_two_children_of_their_parent() -> None:
    x = blobs(1500)
    parent = torch.arange(1500) % 3
    result = kmeans(Features.alone(x), 6, seed=0, restrict=parent)
    assert torch.equal(result.assignment // 2, parent)
    for p in range(3):
        rows = parent == p
        child = result.assignment[rows] - 2 * p
        assert_nearest(
            x[rows], result._replace(assignment=child, distance=result.distance[rows], centroids=result.centroids[2 * p : 2 * p + 2])
        )
        assert 0 < child.double().mean() < 1
        torch.testing.assert_close(result.centroids[2 * p], x[rows][child == 0].mean(0), atol=1e-6, rtol=1e-5)


def test_an_empty_child_is_split_from_its_sibling() -> None:
    x, parent = blobs(600), torch.arange(600) % 2
    start = torch.stack([x[0], torch.full((12,), 9.0), x[1], x[3]])
    result = kmeans(Features.alone(x), 4, seed=0, init=start, restrict=parent)
    assert result.splits == 1
    assert (torch.bincount(result.assignment, minlength=4) > 0).all()


def test_wrong_rows_are_refused() -> None:
    with pytest.raises(InputError, match=r"division\.num_learners"):
        kmeans(Features.alone(blobs(3)), 4, seed=0)
    broken = blobs(30)
    broken[7, 2] = float("nan")
    with pytest.raises(RunError, match="1 rows"):
        kmeans(Features.alone(broken), 2, seed=0)


def test_lloyd_in_float64() -> None:
    """Step by step, from where ours stands: the means of the clusters, and the nearest of them."""
    x, k = blobs(3000, noise=0.8), 20
    here = kmeans(Features.alone(x), k, seed=2, options=KMeansOptions(0))
    for _ in range(6):
        member = torch.nn.functional.one_hot(here.assignment, k).double()
        means = (member.T @ x.double()) / member.sum(0)[:, None]
        here = kmeans(Features.alone(x), k, seed=2, init=here.centroids, options=KMeansOptions(1, tolerance=0))
        # Half a unit of float32, and the rounding of the rows for exact sums, which is finer.
        torch.testing.assert_close(here.centroids.double(), means, rtol=EPS, atol=2.0**-33)
        distance = (x.double()[:, None] - here.centroids.double()).square().sum(2)
        gap = distance.sort(1).values.diff(dim=1)[:, 0]
        clear = gap > 1e-12  # float64 sums of 12 terms are wrong by 1e-15
        assert torch.equal(here.assignment[clear], distance.argmin(1)[clear])


def test_it_stops_at_the_first_gain_below_the_tolerance() -> None:
    x, k = blobs(3000, noise=0.8), 20

    def run(iterations: int, tolerance: float) -> KMeansResult:
        return kmeans(Features.alone(x), k, seed=2, options=KMeansOptions(iterations, tolerance=tolerance))

    objective = [run(i, 0).objective for i in range(30)]
    gain = [(a - b) / a for a, b in pairwise(objective)]
    for tolerance in (1e-1, 1e-2, 1e-3):
        expected = next(i for i, share in enumerate(gain) if share <= tolerance) + 1
        stopped = run(100, tolerance)
        assert (stopped.iterations, stopped.objective) == (expected, objective[expected])


def test_no_worse_than_faiss() -> None:
    """Another start ends in another local optimum, 1 to 2 % apart here: the mean of eight is uncertain by a third of that."""
    x, k = blobs(4000, dim=16, centres=40, noise=0.5), 24
    ours, theirs = [], []
    for seed in range(8):
        peer = faiss.Kmeans(16, k, niter=20, seed=seed, max_points_per_centroid=10**7)
        peer.train(x.numpy())
        theirs.append(float(brute(x, torch.from_numpy(peer.centroids))[0].sum()))
        ours.append(kmeans(Features.alone(x), k, seed=seed).objective)
    assert np.mean(ours) <= 1.02 * np.mean(theirs)


def bounds(n: int, world: int) -> list[int]:
    """Uneven: rank 0 has nothing, the last rank the most."""
    return [0, 0, *(n * i * i // world**2 for i in range(2, world)), n] if world > 1 else [0, n]


def on_ranks(replicated_rows: int) -> dict[str, KMeansResult]:
    x = blobs(2000)
    edges = bounds(len(x), distributed.world_size())
    start, stop = edges[distributed.rank()], edges[distributed.rank() + 1]
    parent = torch.arange(len(x)) % 4
    features = Features(x[start:stop], start, len(x), distributed.all_reduce_sum, distributed.gather_rows, replicated_rows)
    result = {}
    for name, k, restrict in (("all", 6, None), ("parents", 8, parent[start:stop]), ("many", 700, None)):
        found = kmeans(features, k, seed=5, options=KMeansOptions(20), restrict=restrict)
        everyone = distributed.gather_rows(found.assignment), distributed.gather_rows(found.distance)
        result[name] = found._replace(assignment=everyone[0], distance=everyone[1])
    return result


def both_ways() -> dict[int, dict[str, KMeansResult]]:
    return {replicated_rows: on_ranks(replicated_rows) for replicated_rows in (0, 10**6)}


@pytest.mark.parametrize("world", [2, 4])
def test_the_same_clusters_on_any_number_of_ranks(world: int) -> None:
    """Bit for bit, whether every rank holds all rows or only its own."""
    expected = on_ranks(0)
    for ranks in [both_ways(), *spawn(both_ways, world)]:
        for found in ranks.values():
            for name, result in found.items():
                assert all(torch.equal(*pair) for pair in zip(result[:3], expected[name][:3], strict=True)), name
                assert result[3:] == expected[name][3:], name


def bytes_per_iteration(num_rows: int, k: int, dim: int) -> tuple[list[int], int, int]:
    """Sizes of what this rank hands to the sums of a k-means, bytes of rows that it received, and iterations."""
    x = blobs(num_rows, dim=dim)
    edges = bounds(num_rows, distributed.world_size())
    start, stop = edges[distributed.rank()], edges[distributed.rank() + 1]
    summed: list[int] = []

    def all_reduce(tensor: Tensor) -> Tensor:
        summed.append(tensor.nbytes)
        return distributed.all_reduce_sum(tensor)

    before = distributed.traffic()["gather"]
    features = Features(x[start:stop], start, num_rows, all_reduce, distributed.gather_rows, replicated_rows=0)
    result = kmeans(features, k, seed=5, options=KMeansOptions(6, tolerance=0), init=x[:k])
    return summed, distributed.traffic()["gather"] - before, result.iterations


def few_and_many(k: int, dim: int) -> list[tuple[list[int], int, int]]:
    return [bytes_per_iteration(num_rows, k, dim) for num_rows in (2_000, 200_000)]


def test_bytes_per_iteration_do_not_depend_on_the_number_of_rows() -> None:
    k, dim = 5, 8
    for (expected, _, _), (summed, gathered, iterations) in spawn(few_and_many, 4, k, dim):
        # Sums and counts of the clusters, the squared lengths and the number of moved rows, in float64; from a given start no row travels.
        assert summed[1:] == [8 * (k * dim + k + 2)] * (iterations + 1)
        assert summed == expected and gathered == 0 and iterations == 6
