"""Lloyd steps against loops, with and without restriction to a parent's pair of centroids."""

from __future__ import annotations

import pytest
import torch

import dnc_kernels


def random(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("block", [1 << 22, 100])
def test_equals_the_loops(dtype, restricted, block, monkeypatch):
    monkeypatch.setattr("dnc_kernels.reference.BLOCK_ELEMENTS", block)
    x, centroids = random(60, 5, seed=0, dtype=dtype), random(6, 5, seed=1, dtype=dtype)
    restrict = torch.arange(60) % 4 - 1 if restricted else None
    assignment, distance, sums, counts = dnc_kernels.lloyd_step(x, centroids, restrict=restrict)
    expected_sums, expected_counts = torch.zeros(6, 5, dtype=torch.float64), [0] * 6
    for i in range(60):
        parent = None if restrict is None else int(restrict[i])
        if parent == -1:
            assert int(assignment[i]) == -1 and float(distance[i]) == 0
            continue
        allowed = range(6) if parent is None else (2 * parent, 2 * parent + 1)
        squared = {j: float((x[i].double() - centroids[j].double()).square().sum()) for j in allowed}
        nearest = min(squared, key=squared.__getitem__)
        assert int(assignment[i]) == nearest
        assert float(distance[i]) == pytest.approx(squared[nearest], rel=1e-5)
        expected_sums[nearest] += x[i].double()
        expected_counts[nearest] += 1
    assert counts.tolist() == expected_counts and sums.dtype == torch.float64
    assert torch.allclose(sums, expected_sums, rtol=1e-12, atol=1e-12)


def test_no_rows_and_ties():
    centroids = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assignment, distance, sums, counts = dnc_kernels.lloyd_step(torch.empty(0, 2), centroids)
    assert assignment.shape == distance.shape == (0,) and not sums.any() and not counts.any()
    assignment, *_ = dnc_kernels.lloyd_step(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), centroids)
    assert assignment.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("centroids", "restrict", "message"),
    [
        (torch.zeros(0, 2), None, "centroids is empty"),
        (torch.zeros(2, 3), None, "must be 2 wide"),
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64), "a pair of centroids for every parent"),
        (torch.zeros(2, 2), torch.ones(4, dtype=torch.int64), "restrict contains 1"),
        (torch.zeros(2, 2), torch.zeros(4), "restrict must hold 4 integers"),
    ],
)
def test_wrong_input_is_refused(centroids, restrict, message):
    with pytest.raises(ValueError, match=message):
        dnc_kernels.lloyd_step(torch.zeros(4, 2), centroids, restrict=restrict)
