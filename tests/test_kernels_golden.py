"""Values of the published implementation: weights, loss and gradients on its own triplets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import dnc_kernels
from dnc_kernels import Pairs, Rows, Sampling

GOLDEN = np.load(Path(__file__).parent / "golden" / "reference_values.npz")


def golden(case: str) -> dict[str, torch.Tensor]:
    prefix = f"margin_{case}_"
    return {name.removeprefix(prefix): torch.from_numpy(GOLDEN[name]) for name in GOLDEN.files if name.startswith(prefix)}


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.detach() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", ["a", "b", "c"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradients_on_the_published_triplets(case, dtype):
    given = golden(case)
    x, mask, beta = (given[name].to(dtype).requires_grad_() for name in ("x", "mask", "beta"))
    learner = torch.zeros(len(x), dtype=torch.int64)
    z = dnc_kernels.project(x, learner, mask[None])
    assert relative_error(z, given["embedding"]) < 1e-5
    # A triplet is a positive and a negative pair; a pair in several triplets counts several times.
    pairs = Pairs(
        given["anchor"].repeat(2),
        torch.cat([given["positive"], given["negative"]]),
        torch.arange(2 * len(given["anchor"])) < len(given["anchor"]),
    )
    out = dnc_kernels.margin_loss_on_pairs(Rows(z, given["labels"]), pairs, beta=beta, margin=0.2)
    loss = out.loss_sum / out.num_active
    loss.backward()
    assert relative_error(loss, given["loss"]) < 1e-5
    assert relative_error(x.grad, given["grad_x"]) < 1e-5
    assert relative_error(mask.grad, given["grad_mask"]) < 1e-5
    # All these pairs are active and cancel in β: the published gradient is 0. Others are in test_kernels_margin.py.
    assert not given["grad_beta"].any() and float(beta.grad.abs().max()) < 1e-5 / len(beta)


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_reference_mode_has_the_published_weights(case):
    given = golden(case)
    weights = dnc_kernels.negative_weights(Rows(given["embedding"], given["labels"]), sampling=Sampling(mode="reference"))
    different = given["labels"][:, None] != given["labels"]
    expected = torch.where(different, given["weights"], 0).double()
    largest = expected.amax(1, keepdim=True)
    assert float(((weights - expected).abs() / largest).max()) < 1e-4
    assert not weights[~different].any()
