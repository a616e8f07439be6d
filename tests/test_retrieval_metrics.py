"""Metrics and protocols: golden values, pytorch-metric-learning, scikit-learn, left-out queries, and any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError, RunError
from dnc_dist.base.exact import squared_distance
from dnc_dist.processes import distributed
from dnc_dist.retrieval import Columns, Protocol, RetrievalResult, evaluate, nmi
from dnc_dist.retrieval.metrics import average_precision_at_r, r_precision
from tests.rounding import EPS
from tests.spawn import spawn

GOLDEN = np.load(Path(__file__).parent / "golden" / "reference_values.npz")


def sample(n: int, num_classes: int, seed: int = 0, noise: float = 0.3) -> tuple[Tensor, np.ndarray]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (n,), generator=random)
    x = torch.randn(num_classes, 16, generator=random)[labels] + noise * 5 * torch.randn(n, 16, generator=random)
    return torch.nn.functional.normalize(x, dim=1), labels.numpy()


def everything(n: int) -> np.ndarray:
    return np.ones(n, bool)


def leave_one_out(x: Tensor, labels: np.ndarray, recall_at: tuple[int, ...] = (1, 2, 4, 8)) -> RetrievalResult:
    return evaluate(x, torch.arange(len(x)), labels, everything(len(x)), everything(len(x)), protocol="leave-one-out", recall_at=recall_at)


def test_golden_values() -> None:
    ks = (1, 2, 4, 8, 10, 100)
    result = leave_one_out(torch.from_numpy(GOLDEN["retrieval_embeddings"]), GOLDEN["retrieval_labels"], ks)
    for name in [*(f"recall@{k}" for k in ks), "map@r", "r_precision"]:
        assert result.metrics[name] == pytest.approx(float(GOLDEN[f"retrieval_{name}"]), rel=1e-7), name
    assert result.protocol == "leave-one-out"
    assert (result.num_queries, result.num_left_out, result.num_gallery) == (300, 0, 300)


def undecided(query: Tensor, gallery: Tensor, labels: np.ndarray) -> float:
    """Share of the queries two of whose first neighbours are so close to each other that fp32, as the peer has it, may swap them."""
    most = int(np.bincount(labels).max()) + 2
    nearest = (query[:, None].double() - gallery[None].double()).square().sum(2).sort(1).values[:, :most]
    return float((nearest.diff(dim=1) < 8 * EPS).any(1).double().mean())


def test_pytorch_metric_learning_agrees() -> None:
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    names = ("precision_at_1", "mean_average_precision_at_r", "r_precision")
    calculator = AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu"))
    x, labels = sample(600, 40)
    peer = calculator.get_accuracy(x, torch.from_numpy(labels))
    ours = leave_one_out(x, labels).metrics
    allowed = undecided(x, x, labels)
    assert allowed < 0.02  # a metric of another definition differs by more
    for name, mine in zip(names, ("recall@1", "map@r", "r_precision"), strict=True):
        assert ours[mine] == pytest.approx(peer[name], abs=allowed + 1e-6)
    query = np.arange(600) < 200
    peer = calculator.get_accuracy(x[:200], torch.from_numpy(labels[:200]), x[200:], torch.from_numpy(labels[200:]))
    ours = evaluate(x, torch.arange(600), labels, query, ~query, protocol="query-gallery").metrics
    allowed = undecided(x[:200], x[200:], labels)
    assert allowed < 0.02
    for name, mine in zip(names, ("recall@1", "map@r", "r_precision"), strict=True):
        assert ours[mine] == pytest.approx(peer[name], abs=allowed + 1e-6)


def test_r_metrics_divide_by_r_not_by_hits() -> None:
    places, relevant = np.array([[1, 4, 9], [2, 3, 4], [4, 5, 6]]), np.array([3, 3, 3])
    np.testing.assert_allclose(average_precision_at_r(places, relevant), [1 / 3, (1 / 2 + 2 / 3) / 3, 0])
    np.testing.assert_allclose(r_precision(places, relevant), [1 / 3, 2 / 3, 0])
    with pytest.raises(ValueError, match="5"):
        r_precision(places, np.array([1, 5, 1]))


@given(st.lists(st.tuples(st.integers(-3, 4), st.integers(0, 2**40)), min_size=1, max_size=60), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_nmi_equals_scikit_learn(pairs: list[tuple[int, int]], coarse: int) -> None:
    from sklearn.metrics import normalized_mutual_info_score

    first, second = np.array(pairs).T
    second = second % coarse
    assert nmi(first, second) == pytest.approx(normalized_mutual_info_score(first, second), abs=1e-9)
    assert nmi(first, first) == pytest.approx(1)


def test_queries_without_a_partner_are_left_out_and_counted() -> None:
    x, labels = sample(60, 6)
    labels[:3] = [100, 101, 2**40]
    result = leave_one_out(x, labels)
    assert (result.num_queries, result.num_left_out, result.num_gallery) == (57, 3, 60)
    assert not {0, 1, 2} & set(result.sample_queries.tolist())
    with pytest.raises(InputError, match="none of the 60 queries"):
        leave_one_out(x, np.arange(60))


def test_every_query_is_told_what_it_found() -> None:
    x, labels = sample(90, 12, noise=0.6)
    labels[:2] = [100, 101]  # not asking
    x[20] = x[30].clone()
    result = leave_one_out(x, labels, (1, 2))
    found = result.queries
    assert found is not None and found.rows.tolist() == list(range(2, 90))
    distance = squared_distance(x[:, None].numpy(), x[None].numpy()).astype(np.float32)
    np.fill_diagonal(distance, np.inf)
    farthest = 0
    for query, rank, precision, nearest, near in zip(*found, strict=True):
        order = np.lexsort((np.arange(90), distance[query]))
        matches = labels[order[:-1]] == labels[query]
        relevant = int(matches.sum())
        assert rank == 1 + int(matches.argmax())
        farthest = max(farthest, rank)
        expected = sum(matches[: k + 1].mean() for k in range(relevant) if matches[k]) / relevant
        assert precision == pytest.approx(expected, rel=1e-12)
        assert nearest == order[0] and near == distance[query, order[0]]
    assert farthest > max(10, np.bincount(labels[2:]).max())  # otherwise this shows nothing of queries whose neighbours are all others
    assert result.metrics["recall@1"] == (found.first_hit == 1).mean()
    assert result.metrics["map@r"] == pytest.approx(found.average_precision.mean(), rel=1e-12)


def test_rows_that_nobody_holds_are_neither_query_nor_gallery() -> None:
    x, labels = sample(80, 5)
    there = np.flatnonzero(np.arange(80) % 7 > 0)
    some = evaluate(x[there], torch.from_numpy(there), labels, everything(80), everything(80), protocol="leave-one-out")
    assert some.metrics == leave_one_out(x[there], labels[there]).metrics
    assert some.num_gallery == len(there)
    with pytest.raises(ValueError, match="more than once"):
        evaluate(x[:4], torch.tensor([0, 1, 1, 2]), labels, everything(80), everything(80), protocol="leave-one-out")


def test_the_sample_shows_the_true_neighbours() -> None:
    x, labels = sample(50, 5)
    result = leave_one_out(x, labels)
    distance = (x[:, None].double() - x[None].double()).square().sum(2).fill_diagonal_(9)
    assert result.sample_queries.shape == (24,)
    assert (np.diff(result.sample_queries) > 0).all()
    np.testing.assert_array_equal(
        result.sample_neighbours, distance[torch.from_numpy(result.sample_queries)].float().argsort(dim=1, stable=True)[:, :10]
    )
    assert result.sample_distances.shape == (24, 10)


def test_protocols() -> None:
    query, both = np.array([True, True, False]), everything(3)

    def chosen(name: str, query: np.ndarray, gallery: np.ndarray) -> str:
        columns = Columns("test", np.zeros(3, np.int64), query, gallery, {}, lambda: [])
        protocol: Protocol = parts.build("protocol", name)
        return protocol.for_data(columns).name

    assert chosen("auto", both, both) == "leave-one-out"
    assert chosen("auto", query, both) == "query-gallery"
    assert chosen("leave-one-out", query, ~query) == "leave-one-out"
    with pytest.raises(InputError, match=r"data\.protocol"):
        chosen("query-gallery", query, ~both)


def test_a_row_in_both_roles_does_not_find_itself() -> None:
    x, labels = sample(40, 4)
    both = everything(40)
    assert evaluate(x, torch.arange(40), labels, both, both, protocol="query-gallery").metrics == leave_one_out(x, labels).metrics


def test_a_diverged_model_is_named() -> None:
    x, labels = sample(30, 3)
    x[4, 4] = float("inf")
    with pytest.raises(RunError, match="1 embeddings"):
        leave_one_out(x, labels)


def on_ranks() -> list[RetrievalResult]:
    x, labels = sample(400, 30, noise=0.2)
    x[50:70] = x[3].clone()
    world, me = distributed.world_size(), distributed.rank()
    query = np.arange(400) % 3 == 0
    results = []
    owners = [np.arange(400) % world, np.where(query, 0, world - 1), np.full(400, world - 1), np.arange(400) ** 2 // 90_000 % world]
    for owner in owners:
        mine = torch.from_numpy(np.flatnonzero(owner == me)[::-1].copy())
        columns = Columns("test", labels, query, ~query, {}, lambda: [])
        for protocol in ("leave-one-out", "query-gallery"):
            results += parts.build("protocol", protocol).measure(x[mine], mine, columns, (1, 2, 4, 8)).values()
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_the_same_digits_on_any_number_of_ranks(world: int) -> None:
    alone = on_ranks()
    for rank in spawn(on_ranks, world):
        for got, expected in zip(rank, alone, strict=True):
            for name, value in vars(expected).items():
                np.testing.assert_array_equal(getattr(got, name), value, err_msg=name)
