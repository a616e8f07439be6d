"""On a real GPU: real sizes against float64, the same bits in every run, memory without a (B, B) tensor, no wait, no recompilation.

The functional tests of the kernels (test_triton_sampling, _margin, _lloyd) run on a GPU as they do in the interpreter; what
stands here needs the sizes, the scheduling or the allocator of a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import dnc_kernels
from dnc_kernels import Rows, Sampling, race, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GIB = 1 << 30


def batch(rows: int, dim: int, learners: int, masks: str = "soft", *, per_class: int = 4, dtype=torch.float32, seed: int = 0) -> dict:
    """Arguments of a step on the GPU: raw embeddings that need a gradient, masks, a β per class, labels, learners, row ids."""
    random = torch.Generator("cuda").manual_seed(seed)
    labels = torch.arange(rows, device="cuda") // per_class
    centres = torch.randn(int(labels.max()) + 1, dim, generator=random, device="cuda")
    embeddings = (0.6 * centres[labels] + torch.randn(rows, dim, generator=random, device="cuda")).to(dtype)
    order = torch.randperm(rows, generator=random, device="cuda")
    if masks == "soft":
        weights = 0.5 + torch.rand(learners, dim, generator=random, device="cuda")
    else:
        weights = (torch.arange(dim, device="cuda") * learners // dim == torch.arange(learners, device="cuda")[:, None]).float()
    return {
        "embeddings": embeddings[order].requires_grad_(),
        "labels": labels[order],
        "learner": (labels * learners // (int(labels.max()) + 1))[order],
        "row_ids": order,
        "masks": weights.requires_grad_(masks == "soft"),
        "beta": torch.full((int(labels.max()) + 1,), 1.2, device="cuda", requires_grad=True),
    }


def step(given: dict, *, number: Tensor | int = 3, positives: int = 3, mode: str = "paper", n: float | None = None):
    return dnc_kernels.margin_loss(
        Rows(given["embeddings"], given["labels"], given["learner"], given["row_ids"]),
        beta=given["beta"],
        masks=given["masks"],
        num_learners=given["masks"].shape[0],
        sampling=Sampling(nonzero_loss_cutoff=1.4, mode=mode, effective_dim=n, max_positives=positives, seed=7, step=number),
    )


def gradients(given: dict, **options) -> list[Tensor]:
    leaves = [given[name] for name in ("embeddings", "masks", "beta") if given[name].requires_grad]
    out = step(given, **options)
    return [out.learner_loss_sum.detach(), *torch.autograd.grad((out.learner_loss_sum / out.learner_num_active.clamp(min=1)).sum(), leaves)]


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("masks", ["soft", "sliced"])
@pytest.mark.parametrize(("rows", "dim", "learners"), [(128, 512, 4), (1024, 512, 4), (4096, 512, 32), (1021, 128, 3), (512, 2048, 1)])
def test_equals_the_float64_reference(rows, dim, learners, masks):
    if masks == "sliced" and dim % learners:
        pytest.skip("an embedding of this width cannot be sliced among so many learners")
    given = batch(rows, dim, learners, masks)
    n = dim // learners if masks == "sliced" else None
    z = reference.project(given["embeddings"].double(), given["learner"], given["masks"].double())
    rows = Rows(z, given["labels"], given["learner"], given["row_ids"])
    sampling = Sampling(effective_dim=n, max_positives=3, seed=7, step=3)
    expected = reference.sample_pairs(rows, sampling=sampling)
    pairs = dnc_kernels.sample_pairs(rows._replace(z=z.float()), sampling=sampling)
    assert torch.equal(pairs.other[pairs.positive], expected.other[expected.positive])
    assert {name: int(value) for name, value in pairs.stats.items()} == {name: int(value) for name, value in expected.stats.items()}
    assert float((pairs.other != expected.other).float().mean()) < 2e-3  # near ties only; the interpreter tests judge each

    double = {name: given[name].detach().double().requires_grad_(given[name].requires_grad) for name in ("embeddings", "masks", "beta")}
    z = reference.project(double["embeddings"], given["learner"], double["masks"])
    judge = reference.margin_loss_on_pairs(Rows(z, given["labels"], given["learner"]), pairs, beta=double["beta"], num_learners=learners)
    leaves = [value for value in double.values() if value.requires_grad]
    wanted = torch.autograd.grad((judge.learner_loss_sum / judge.learner_num_active.clamp(min=1)).sum(), leaves)
    loss, *found = gradients(given, n=n)
    assert relative_error(loss, judge.learner_loss_sum.detach()) < 1e-5
    for value, target in zip(found, wanted, strict=True):
        assert relative_error(value, target) < 1e-5


@pytest.mark.parametrize("mode", ["paper", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_fifty_times_over_ragged_sizes(mode, dtype):
    for rows, dim, learners in [(37, 24, 1), (130, 65, 3), (777, 512, 4), (2049, 96, 7), (4099, 512, 32)]:
        given = batch(rows, dim, learners, per_class=3, dtype=dtype, seed=rows)
        first = gradients(given, mode=mode, positives=5)
        for _ in range(50):
            for value, expected in zip(gradients(given, mode=mode, positives=5), first, strict=True):
                assert torch.equal(value, expected), (rows, dim, learners)


@pytest.mark.parametrize("learners", [1, 4])
def test_a_split_race_draws_the_same(learners, monkeypatch):
    """128 anchors of a rank against the rows of 64 ranks."""
    given = batch(8192, 512, learners)
    z = normalize(given["embeddings"].detach())
    references = Rows(z, given["labels"], given["learner"], given["row_ids"])
    anchors = Rows(*(column[:128] for column in references))
    chosen, sampling = [], Sampling(max_positives=3, seed=7, step=3)
    default = race.num_splits
    monkeypatch.setattr(race, "num_splits", lambda *args: chosen.append(default(*args)) or chosen[-1])
    split = dnc_kernels.sample_pairs(anchors, references, sampling=sampling)
    assert chosen[0] > 1
    monkeypatch.setattr(race, "num_splits", lambda *args: 1)
    whole = dnc_kernels.sample_pairs(anchors, references, sampling=sampling)
    assert torch.equal(split.other, whole.other)
    assert {name: int(value) for name, value in split.stats.items()} == {name: int(value) for name, value in whole.stats.items()}


@pytest.mark.parametrize("learners", [1, 32])
def test_memory_grows_with_the_rows_not_with_their_square(learners):
    rows, dim, slots = 65_536, 512, 6
    given = batch(rows, dim, learners)
    gradients(given)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients(given)
    peak = torch.cuda.max_memory_allocated() - before
    # z and the embeddings' gradient are (B, D) float32; pairs cost at most 64 bytes a slot. A (B, B) float32 has 16 GiB.
    assert peak < 4 * rows * dim * 4 + 64 * rows * slots, f"{peak / GIB:.2f} GiB"
    assert torch.cuda.max_memory_allocated() < 2 * GIB


def test_nothing_waits_for_the_device():
    given = batch(512, 128, 4)
    gradients(given)
    x, centroids = torch.randn(5000, 128, device="cuda"), torch.randn(8, 128, device="cuda")
    dnc_kernels.lloyd_step(x, centroids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(given, number=4)
        dnc_kernels.lloyd_step(x, centroids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_follows_the_step_and_the_embeddings():
    given, number = batch(256, 64, 4), torch.zeros((), dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients(given, number=number)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(given, number=number)
    for value in (5, 6):
        number.fill_(value)
        with torch.no_grad():
            given["embeddings"].copy_(torch.randn_like(given["embeddings"]))
        graph.replay()
        for found, expected in zip(captured, gradients(given, number=value), strict=True):
            assert torch.equal(found, expected)


def test_sizes_seeds_and_clusters_do_not_recompile():
    import triton

    compiled = []
    previous = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda **event: compiled.append(event["src"].name)
    try:
        for rows in (4000, 4003):  # both sides of the tile rule's divisibility
            gradients(batch(rows, 64, 8))
        dnc_kernels.lloyd_step(torch.randn(10_000, 64, device="cuda"), torch.randn(8, 64, device="cuda"))
        compiled.clear()
        for rows, learners, number in [(3001, 5, 2), (3600, 7, 2**33), (4096, 8, 5)]:
            gradients(batch(rows, 64, learners), number=number)
        for rows in (17, 12_345, 100_000, 1_000_003):
            dnc_kernels.lloyd_step(torch.randn(rows, 64, device="cuda"), torch.randn(8, 64, device="cuda"))
    finally:
        triton.knobs.compilation.listener = previous
    assert compiled == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "dim", "clusters"), [(1_000_000, 512, 32), (200_000, 2048, 32), (200_000, 512, 1000), (99_991, 96, 5)])
def test_lloyd_equals_float64(rows, dim, clusters, dtype):
    x = normalize(torch.randn(rows, dim, device="cuda")).to(dtype)
    centroids = x[torch.randperm(rows, device="cuda")[:clusters]].float()
    assignment, distance, sums, counts = dnc_kernels.lloyd_step(x, centroids)
    assert int(counts.sum()) == rows and torch.equal(counts, torch.bincount(assignment, minlength=clusters))
    chosen = torch.randperm(rows, device="cuda")[:20_000]
    exact = torch.cdist(x[chosen].double(), centroids.double()).square()
    assert float((exact.gather(1, assignment[chosen, None])[:, 0] - exact.amin(1)).max()) < 1e-5
    assert float((distance[chosen].double() - exact.gather(1, assignment[chosen, None])[:, 0]).abs().max()) < 1e-5
    expected = torch.zeros_like(sums)
    for start in range(0, rows, 100_000):
        block = slice(start, start + 100_000)
        expected += torch.nn.functional.one_hot(assignment[block], clusters).double().T @ x[block].double()
    assert relative_error(sums, expected) < 1e-6
    again = dnc_kernels.lloyd_step(x, centroids)
    assert all(torch.equal(a, b) for a, b in zip(again, (assignment, distance, sums, counts), strict=True))


def test_offsets_beyond_two_to_the_31():
    rows, dim = 4_500_000, 512
    x = torch.empty(rows, dim, dtype=torch.bfloat16, device="cuda").normal_()
    centroids = x[-4:].float()
    assignment, distance, _, counts = dnc_kernels.lloyd_step(x, centroids)
    assert assignment[-4:].tolist() == [0, 1, 2, 3] and float(distance[-4:].max()) < 1e-2 and int(counts.sum()) == rows
