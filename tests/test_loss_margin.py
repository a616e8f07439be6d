"""The margin loss module: its parameters, its sums over rank slices, and how it is built from config values."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

import dnc_kernels
from dnc_dist.errors import InputError
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
    expected = dnc_kernels.margin_loss(z, labels, beta=1.1, learner=learner, row_ids=row_ids, num_learners=2, seed=1, step=2)
    assert float(out.loss_sum.detach()) == pytest.approx(float(expected.loss_sum)) and out.learner_loss_sum.shape == (2,)
    if shape is not None:
        out.loss_sum.backward()
        assert parameters["beta"].shape == shape and bool(parameters["beta"].grad.any())


def test_local_anchors_against_gathered_references_add_up():
    loss = MarginLoss(8, nonzero_loss_cutoff=1.8).double()
    rows = batch()
    whole = loss(*rows, 2, 3, 4)
    parts = [loss(*(column[own] for column in rows), 2, 3, 4, References(*rows), 2) for own in (slice(0, 5), slice(5, 24))]
    assert torch.allclose(parts[0].learner_loss_sum + parts[1].learner_loss_sum, whole.learner_loss_sum)
    for name, value in whole.stats.items():
        assert float(parts[0].stats[name] + parts[1].stats[name]) == pytest.approx(float(value)), name


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
