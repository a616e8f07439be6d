"""Exact search on one rank: brute force as the oracle, ties, padding, large row numbers (several ranks: test_retrieval_metrics)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dnc_dist.exact import squared_distance
from dnc_dist.retrieval import search
from dnc_dist.retrieval.search import Neighbours, topk


def unit(n: int, dim: int = 24, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def brute(query: Tensor, gallery: Tensor, k: int, query_ids: Tensor, gallery_ids: Tensor, exclude_self: bool) -> Neighbours:
    distance = torch.from_numpy(squared_distance(query[:, None].numpy(), gallery[None].numpy())).float()
    if exclude_self:
        distance[query_ids[:, None] == gallery_ids[None]] = float("inf")
    order = np.lexsort((gallery_ids.expand_as(distance).numpy(), distance.numpy()), axis=1)[:, :k]
    found = torch.from_numpy(order)
    return Neighbours(gallery_ids[found], distance.gather(1, found))


def assert_equal(got: Neighbours, expected: Neighbours) -> None:
    assert torch.equal(got.distance, expected.distance)
    assert torch.equal(got.ids, expected.ids)


def same_as_brute(query: Tensor, gallery: Tensor, k: int, query_ids: Tensor, gallery_ids: Tensor, exclude_self: bool) -> None:
    got = topk(query, gallery, k, query_ids=query_ids, gallery_ids=gallery_ids, exclude_self=exclude_self)
    assert_equal(got, brute(query, gallery, k, query_ids, gallery_ids, exclude_self))


@pytest.mark.parametrize("k", [1, 10, 300])
@pytest.mark.parametrize("exclude_self", [True, False])
def test_neighbours_equal_brute_force(k: int, exclude_self: bool) -> None:
    x, rows = unit(700), torch.arange(700)
    same_as_brute(x, x, k, rows, rows, exclude_self)
    same_as_brute(unit(40, seed=1), x, k, torch.arange(40), rows, exclude_self)


def test_distances_are_direct_and_exact() -> None:
    x = unit(5)
    assert squared_distance(x[0].numpy(), x[0].numpy()) == 0
    expected = (x[:, None].double() - x[None].double()).square().sum(2)
    np.testing.assert_allclose(squared_distance(x[:, None].numpy(), x[None].numpy()), expected, rtol=1e-14)


def test_row_numbers_above_2_to_the_24_and_any_order() -> None:
    x = unit(200)
    rows = 2**24 + 1 + torch.randperm(200, generator=torch.Generator().manual_seed(3))
    same_as_brute(x, x, 7, rows, rows, True)
    same_as_brute(x, x, 7, rows + 2**40, rows + 2**40, True)


@pytest.mark.parametrize("copies", [3, 150, 600])
def test_equal_rows_come_in_the_order_of_their_numbers(copies: int) -> None:
    x = unit(600)
    x[torch.randperm(600, generator=torch.Generator().manual_seed(1))[:copies]] = x[0].clone()
    rows = torch.randperm(600, generator=torch.Generator().manual_seed(2))
    same_as_brute(x, x, 5, rows, rows, True)


@pytest.mark.parametrize("spread", [1e-3, 1e-6, 1e-7])
def test_nearly_collapsed_embeddings_are_still_ranked_exactly(spread: float) -> None:
    x = unit(1)[0] + spread * torch.randn(500, 24, generator=torch.Generator().manual_seed(0))
    same_as_brute(x, x, 20, torch.arange(500), torch.arange(500), True)


def test_missing_neighbours_are_padded() -> None:
    x = unit(4)
    got = topk(x, x, 6, query_ids=torch.arange(4), gallery_ids=torch.arange(4), exclude_self=True)
    assert got.ids.shape == (4, 6)
    assert got.ids[:, 3:].eq(-1).all()
    assert got.distance[:, 3:].isinf().all()
    assert got.ids[:, :3].ge(0).all()
    none = topk(x, x[:0], 2, query_ids=torch.arange(4), gallery_ids=torch.arange(0), exclude_self=True)
    assert none.ids.eq(-1).all()
    assert topk(x[:0], x, 2, query_ids=torch.arange(0), gallery_ids=torch.arange(4), exclude_self=True).ids.shape == (0, 2)


def test_small_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rows = unit(150), torch.arange(150)
    expected = topk(x, x, 9, query_ids=rows, gallery_ids=rows, exclude_self=True)
    for name, value in (("WORK_ELEMENTS", 100), ("CANDIDATES", 100), ("LIST_ELEMENTS", 90), ("MARGIN", 0)):
        monkeypatch.setattr(search, name, value)
    assert_equal(topk(x, x, 9, query_ids=rows, gallery_ids=rows, exclude_self=True), expected)
