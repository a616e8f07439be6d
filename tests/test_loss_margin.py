"""The margin loss module: its parameters, its sums over rank slices, and how it is built from config values."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.functional import normalize

import dnc_kernels
from dnc_dist.base.errors import InputError
from dnc_dist.loss import MarginLoss, ProxyAnchorLoss, References, build_loss


def batch(num_rows: int = 24, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    raw = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return normalize(raw), torch.arange(num_rows) // 3, torch.arange(num_rows) // 12, torch.arange(num_rows) * 11


@pytest.mark.parametrize(("learn_beta", "shape"), [("fixed", None), ("scalar", (1,)), ("class", (8,))])
def test_beta(learn_beta, shape):
    loss = MarginLoss(8, beta=1.1, learn_beta=learn_beta).double()
    parameters = dict(loss.named_parameters())
    assert list(parameters) == ([] if shape is None else ["beta"]) and "beta" in loss.state_dict()
    z, labels, learner, row_ids = batch()
    out = loss(z, labels, learner, row_ids, 2, 1, 2)
    expected = dnc_kernels.margin_loss(
        dnc_kernels.Rows(z, labels, learner, row_ids), beta=1.1, num_learners=2, sampling=dnc_kernels.Sampling(seed=1, step=2)
    )
    assert float(out.loss_sum.detach()) == pytest.approx(float(expected.loss_sum)) and out.learner_loss_sum.shape == (2,)
    if shape is not None:
        out.loss_sum.backward()
        assert parameters["beta"].shape == shape and bool(parameters["beta"].grad.any())


def on_two_ranks(
    loss: MarginLoss, rows: tuple[torch.Tensor, ...], cut: int, max_positives: int = 2
) -> list[tuple[dnc_kernels.MarginLossOutput, torch.Tensor]]:
    """What the loss gives for rows before and after ``cut``, each on a thread that meets the other one to gather; and its own z."""
    meeting, brought = threading.Barrier(2, timeout=30), {}

    def rank(number: int) -> tuple[dnc_kernels.MarginLossOutput, torch.Tensor]:
        def gather(part: torch.Tensor) -> torch.Tensor:
            brought[number] = part
            meeting.wait()
            return torch.cat([brought[0], brought[1]])

        own = slice(0, cut) if number == 0 else slice(cut, None)
        z = rows[0][own].clone().requires_grad_()
        references = References(*rows, start=own.start, gather=gather)
        return loss(z, *(column[own] for column in rows[1:]), 2, 3, 4, references, max_positives), z

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, range(2)))


@pytest.mark.parametrize("cut", [1, 5, 23])
def test_local_anchors_against_gathered_references_add_up(cut):
    loss = MarginLoss(8, nonzero_loss_cutoff=1.8, learn_beta="class").double()
    rows = batch()
    weights = torch.tensor([1.0, -0.3])  # a learner's gradient must reach its own rows only
    z = rows[0].clone().requires_grad_()
    whole = loss(z, *rows[1:], 2, 3, 4)
    beta_gradient, gradient = torch.autograd.grad(whole.learner_loss_sum @ weights.double(), [loss.beta, z])
    parts = on_two_ranks(loss, rows, cut)
    assert torch.allclose(sum(out.learner_loss_sum for out, _ in parts), whole.learner_loss_sum)
    for name, value in whole.stats.items():
        assert sum(float(out.stats[name]) for out, _ in parts) == pytest.approx(float(value)), name
    gradients = [torch.autograd.grad(out.learner_loss_sum @ weights.double(), [loss.beta, own]) for out, own in parts]
    assert gradient.abs().sum(1).min() > 0
    torch.testing.assert_close(torch.cat([of_rows for _, of_rows in gradients]), gradient)
    torch.testing.assert_close(gradients[0][0] + gradients[1][0], beta_gradient)


def test_classes_of_one_row_have_no_pairs_on_any_rank():
    z, _, learner, row_ids = batch()
    parts = on_two_ranks(MarginLoss(24).double(), (z, torch.arange(24), learner, row_ids), 7, max_positives=0)
    assert all(int(out.num_active) == 0 and not out.learner_loss_sum.any() for out, _ in parts)


def test_options_reach_the_sampling():
    z, labels, learner, row_ids = batch()
    far = MarginLoss(8, nonzero_loss_cutoff=0.7, cutoff=0.6)(z, labels, learner, row_ids, 2, 0, 0)
    floors = MarginLoss(8, nonzero_loss_cutoff=0.7, cutoff=0.6, mode="reference")(z, labels, learner, row_ids, 2, 0, 0)
    assert int(far.stats["negative_shortfall"]) > 0 and int(floors.stats["negative_shortfall"]) == 0


def test_build_loss():
    loss = build_loss("margin", {"margin": 0.3, "learn_beta": "class"}, 5, 7)
    assert isinstance(loss, MarginLoss) and loss.margin == 0.3 and loss.beta.shape == (5,) and loss.kind == "pairwise"
    proxies = build_loss("proxy_anchor", {"scale": 16.0}, 5, 7)
    assert isinstance(proxies, ProxyAnchorLoss) and proxies.proxies.shape == (5, 7) and proxies.kind == "whole_batch"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("margn", {}, "did you mean margin"),
        ("margin", {"bta": 1}, "did you mean beta"),
        ("proxy_anchor", {"beta": 1}, "loss.beta is no option of loss.name=proxy_anchor"),
        ("margin", {"learn_beta": "yes"}, "fixed, scalar, class"),
        ("margin", {"mode": "published"}, "paper, reference"),
        ("margin", {"cutoff": 1.5}, "loss.cutoff=1.5"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        build_loss(name, options, 5, 7)
