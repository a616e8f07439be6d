"""Exact search: brute force as the oracle, ties, padding, large row numbers, bounded memory (more on ranks: test_retrieval_metrics)."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dnc_dist.base.exact import gram_error, squared_distance
from dnc_dist.processes import distributed
from dnc_dist.retrieval import gallery as rows_of_a_rank
from dnc_dist.retrieval import products, search
from dnc_dist.retrieval.products import propose_by_products
from dnc_dist.retrieval.search import Neighbours, topk, topk_blocks
from tests.spawn import spawn


@pytest.fixture(autouse=True, params=["faiss", "products"])
def proposals(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever proposes candidates, the neighbours are the same. Products are what a GPU does; here the CPU computes them."""
    if request.param == "products":
        monkeypatch.setattr(search, "proposals", lambda queries, device: propose_by_products(queries, torch.device("cpu")))


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
    monkeypatch.setattr(rows_of_a_rank, "BLOCK_ELEMENTS", 400)
    assert_equal(topk(x, x, 9, query_ids=rows, gallery_ids=rows, exclude_self=True), expected)


def test_rows_without_a_number_are_not_searched() -> None:
    x, rows = unit(90), torch.arange(90)
    searched = rows % 3 > 0
    got = topk(x[:20], x, 8, query_ids=rows[:20], gallery_ids=torch.where(searched, rows, -1), exclude_self=True)
    assert_equal(got, brute(x[:20], x[searched], 8, rows[:20], rows[searched], True))


NUM_GALLERY, NUM_QUERIES, DIM, K = 20_000, 500, 32, 10


def search_in_little_memory(num_queries: int) -> tuple[Neighbours, int, int]:
    """This rank's neighbours, the bytes of its gallery, and the most that NumPy held while searching it."""
    for name, value in (("WORK_ELEMENTS", 1 << 12), ("CANDIDATES", 1 << 12), ("LIST_ELEMENTS", 1 << 13)):
        setattr(search, name, value)
    rows_of_a_rank.BLOCK_ELEMENTS = 1 << 15
    rows, queries = (torch.arange(*distributed.local_range(count)) for count in (NUM_GALLERY, num_queries))
    gallery = unit(NUM_GALLERY, DIM)[rows]
    found = Neighbours(torch.empty(len(queries), K, dtype=torch.int64), torch.empty(len(queries), K))
    blocks = topk_blocks(unit(num_queries, DIM, seed=1)[queries], gallery, K, query_ids=queries, gallery_ids=rows, exclude_self=False)
    tracemalloc.start()
    for which, near in blocks:
        found.ids[which], found.distance[which] = near
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return found, gallery.nbytes, peak


def search_few_and_many() -> tuple[Neighbours, int, int, int]:
    """The neighbours of some queries, the bytes of the gallery, the peak for these queries and for three times as many."""
    found, gallery_bytes, peak = search_in_little_memory(NUM_QUERIES)
    return found, gallery_bytes, peak, search_in_little_memory(3 * NUM_QUERIES)[2]


def test_a_gallery_on_two_ranks_in_little_memory() -> None:
    parts = spawn(search_few_and_many, 2)
    gallery, rows = unit(NUM_GALLERY, DIM), torch.arange(NUM_GALLERY)
    expected = [brute(block, gallery, K, rows[: len(block)], rows, False) for block in unit(NUM_QUERIES, DIM, seed=1).split(20)]
    for place in range(2):
        assert torch.equal(torch.cat([part[0][place] for part in parts]), torch.cat([block[place] for block in expected]))
    for _, gallery_bytes, peak, peak_of_more in parts:
        assert peak < gallery_bytes, "the gallery was copied as a whole"
        assert peak_of_more < 1.1 * peak, "memory grows with the number of queries"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_products_are_within_the_bound_that_the_search_relies_on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CANDIDATES_ELEMENTS", 1000)  # several products
    queries, rows = (10 * torch.randn(number, 257, generator=torch.Generator().manual_seed(number)).numpy() for number in (30, 400))
    distance, row = propose_by_products(queries, torch.device(device))(rows, 400)
    lengths = np.linalg.norm(queries.astype(np.float64), axis=1)[:, None], np.linalg.norm(rows.astype(np.float64), axis=1)[row]
    error = np.abs(distance - squared_distance(queries[:, None], rows[row]))
    assert (error <= gram_error(257, *lengths)).all()
    assert error.max() > 0
    assert (np.diff(distance, axis=1) >= 0).all()
    assert (np.sort(row, axis=1) == np.arange(400)).all()


def choose_by_name() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def choose_by_old_name() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def propose_where_tf32_is_chosen(choose: Callable[[], None]) -> tuple[list[str], np.ndarray]:
    """In a process of its own, as torch remembers who has used which name."""
    choose()
    x, seen = unit(20).numpy(), []
    topk_of = Tensor.topk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "topk", lambda *args, **options: seen.append(precision()) or topk_of(*args, **options))
        rows = propose_by_products(x, torch.device("cpu"))(x, 1)[1]
    return [*seen, precision()], rows


def precision() -> str:
    return torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize("choose", [choose_by_name, choose_by_old_name])
def test_products_are_exact_where_the_program_has_chosen_tf32_and_leave_its_choice(choose: Callable[[], None]) -> None:
    [(seen, rows)] = spawn(propose_where_tf32_is_chosen, 1, choose)
    assert seen == ["ieee", "tf32"]
    assert (rows[:, 0] == np.arange(20)).all()
