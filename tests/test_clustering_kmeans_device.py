"""k-means with the fused Lloyd step, on a GPU or in the interpreter, against the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.clustering import DivisionRules, Features, KMeansOptions, KMeansResult, divide, kmeans, spread_features
from dnc_dist.clustering.device import choose_backend
from dnc_dist.processes import distributed
from tests.spawn import spawn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNC_KERNELS", "triton")


def blobs(n: int, dim: int = 12, centres: int = 5, noise: float = 0.25, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(centres, dim, generator=random)[torch.randint(centres, (n,), generator=random)]
    return torch.nn.functional.normalize(x + noise * torch.randn(n, dim, generator=random), dim=1)


TRITON = KMeansOptions(backend="triton")


def both(x: Tensor, k: int, iterations: int = 100, **start: Tensor) -> tuple[KMeansResult, KMeansResult]:
    features = Features.alone(x.to(DEVICE))
    ours, peer = (kmeans(features, k, seed=1, options=KMeansOptions(iterations, name), **start) for name in ("triton", "numpy"))
    return ours, peer


def assert_equal(ours: KMeansResult, peer: KMeansResult) -> None:
    assert ours.assignment.device.type == ours.distance.device.type == ours.centroids.device.type == "cpu"
    assert ours.objective == pytest.approx(peer.objective, rel=1e-6, abs=1e-9)
    assert (ours.iterations, ours.splits) == (peer.iterations, peer.splits)
    assert torch.equal(ours.assignment, peer.assignment)
    torch.testing.assert_close(ours.centroids, peer.centroids, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.distance, peer.distance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "k"), [(200, 5), (100, 1), (9, 9)])
@pytest.mark.parametrize("iterations", [0, 2, 100])
def test_the_same_as_on_the_cpu(n: int, k: int, iterations: int) -> None:
    ours, peer = both(blobs(n), k, iterations=iterations)
    assert_equal(ours, peer)
    assert iterations < 100 or ours.iterations < 100, "did not converge"


def test_parents() -> None:
    ours, peer = both(blobs(300), 6, restrict=torch.arange(300) % 3)
    assert_equal(ours, peer)
    assert torch.equal(ours.assignment // 2, torch.arange(300) % 3)


def test_a_warm_start() -> None:
    x = blobs(300)
    first = kmeans(Features.alone(x.to(DEVICE)), 5, seed=1, options=TRITON)
    again = kmeans(Features.alone(x.to(DEVICE)), 5, seed=2, init=first.centroids, options=TRITON)
    assert again.iterations == 1 and torch.equal(again.assignment, first.assignment)


def test_empty_clusters_get_half_of_another() -> None:
    """The host learns of an empty cluster one step late, and the result is still that of the CPU."""
    x = blobs(300)
    ours, peer = both(x, 5, init=torch.cat([x[:2], torch.full((3, 12), 50.0)]))
    assert_equal(ours, peer)
    assert ours.splits >= 3 and (torch.bincount(ours.assignment, minlength=5) > 0).all()


def test_fewer_distinct_rows_than_clusters() -> None:
    ours, peer = both(torch.eye(4, 12).repeat(10, 1), 8, iterations=4)
    assert ours.objective == pytest.approx(peer.objective, rel=1e-4, abs=1e-9)


def test_wrong_rows_are_refused() -> None:
    broken = blobs(30).to(DEVICE)
    broken[7, 2], broken[9, 0] = torch.nan, -torch.inf
    with pytest.raises(RunError, match="2 rows"):
        kmeans(Features.alone(broken), 2, seed=0, options=TRITON)
    with pytest.raises(InputError, match=r"division\.num_learners"):
        kmeans(Features.alone(broken[:3]), 4, seed=0, options=TRITON)


def test_which_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("triton", DEVICE) == "triton"
    assert choose_backend("auto", torch.device("cpu")) == choose_backend("numpy", DEVICE) == "numpy"
    assert DEVICE.type == "cpu" or choose_backend("auto", DEVICE) == "triton"
    monkeypatch.setenv("DNC_KERNELS", "reference")
    assert choose_backend("auto", DEVICE) == "numpy" and choose_backend("faiss", DEVICE) == "faiss"
    with pytest.raises(InputError, match=r"division\.kmeans_backend=triton does not run"):
        choose_backend("triton", DEVICE)


def test_a_division() -> None:
    """All of it: trials, 2-means of every cluster at once, on rows that stand on the CPU."""
    features, labels = blobs(240, centres=12, seed=3), np.arange(240) % 12
    spread = spread_features(features, 0, len(labels))
    divisions = []
    for backend in ("triton", "cpu"):
        previous = None
        for epoch in (0, 1, 2):
            rules = DivisionRules(4, seed=4, trials=3, kmeans=KMeansOptions(backend=backend))  # type: ignore[arg-type]
            previous = divide(spread, labels, rules, epoch=epoch, previous=previous)
        divisions.append(previous)
    ours, peer = divisions
    assert ours is not None and peer is not None and ours.num_learners == 4
    assert np.array_equal(ours.learner_of, peer.learner_of) and ours.objective == pytest.approx(peer.objective)


def on_ranks() -> dict[tuple[str, int], KMeansResult]:
    """Two ranks share the rows unevenly; of the second case the first rank has none."""
    x, device = blobs(160), distributed.device()
    parent = torch.arange(160) % 3
    empty = torch.cat([x[:2], torch.full((2, 12), 50.0)])
    found = {}
    for name, k, restrict, init, first in (("all", 5, None, None, 40), ("parents", 6, parent, None, 0), ("empty", 4, None, empty, 40)):
        edges = [0, first, len(x)] if distributed.world_size() == 2 else [0, len(x)]
        local = slice(edges[distributed.rank()], edges[distributed.rank() + 1])
        for replicated_rows in (0, 10**6):
            features = Features(
                x[local].to(device), local.start, len(x), distributed.all_reduce_sum, distributed.gather_rows, replicated_rows, device
            )
            own = None if restrict is None else restrict[local].to(device)
            result = kmeans(features, k, seed=5, options=KMeansOptions(3, "triton"), init=init, restrict=own)
            everyone = [distributed.gather_rows(part.to(device)).cpu() for part in (result.assignment, result.distance)]
            found[name, replicated_rows] = result._replace(assignment=everyone[0], distance=everyone[1])
    return found


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="two ranks cannot share a GPU over NCCL")
def test_the_same_clusters_on_two_ranks() -> None:
    alone = on_ranks()
    for found in spawn(on_ranks, 2):
        for (name, replicated_rows), result in found.items():
            expected = alone[name, replicated_rows]
            assert result.splits == expected.splits
            if replicated_rows:
                assert all(torch.equal(*pair) for pair in zip(result[:3], expected[:3], strict=True))
                assert result.objective == expected.objective
            else:
                assert result.objective == pytest.approx(expected.objective, rel=1e-6)
                assert (result.assignment == expected.assignment).double().mean() >= 0.99
