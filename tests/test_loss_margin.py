"""The margin loss module: its parameters, its sums over rank slices, and how it is built from config values."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

import dnc_kernels
from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.loss.base import StepRows
from dnc_dist.loss.margin import MarginLoss
from dnc_dist.loss.pairwise import LearnerSums
from dnc_dist.loss.proxy_anchor import ProxyAnchorLoss


def batch(num_rows: int = 24, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    raw = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return normalize(raw), torch.arange(num_rows) // 3, torch.arange(num_rows) // 12, torch.arange(num_rows) * 11


def make(num_classes: int, **options: Any) -> MarginLoss:
    return MarginLoss(MarginLoss.Options(**options), num_classes=num_classes, embedding_dim=8).double()


class RowsOfThread(StepRows):
    """Rows of a rank that is a thread; ``meet`` brings its rows and those of the other one together."""

    meet: Callable[[torch.Tensor], torch.Tensor]
    alone, start = False, 0

    def gather(self, rows: torch.Tensor, grad: str = "none") -> torch.Tensor:
        assert grad == "none"
        return self.meet(rows.detach())


def step_rows(
    z: torch.Tensor,
    labels: torch.Tensor,
    learner: torch.Tensor,
    row_ids: torch.Tensor,
    seed: int = 3,
    kind: type[StepRows] = StepRows,
    **more,
) -> StepRows:
    columns = {"labels": labels, "learner": learner, "row_ids": row_ids, "rows_of_ranks": [len(z)]}
    return kind(z, None, num_learners=2, seed=seed, step=4, **columns, **more)


@pytest.mark.parametrize(("learn_beta", "shape"), [("fixed", None), ("scalar", (1,)), ("class", (8,))])
def test_beta(learn_beta, shape):
    loss = make(8, beta=1.1, learn_beta=learn_beta)
    parameters = dict(loss.named_parameters())
    assert list(parameters) == ([] if shape is None else ["beta"]) and "beta" in loss.state_dict()
    z, labels, learner, row_ids = batch()
    out = loss.learner_sums(step_rows(z, labels, learner, row_ids))
    expected = dnc_kernels.margin_loss(
        dnc_kernels.Rows(z, labels, learner, row_ids), beta=1.1, num_learners=2, sampling=dnc_kernels.Sampling(seed=3, step=4)
    )
    assert torch.allclose(out.sums, expected.learner_loss_sum) and torch.equal(out.counts, expected.learner_num_active)
    if shape is not None:
        out.sums.sum().backward()
        assert parameters["beta"].shape == shape and bool(parameters["beta"].grad.any())


def on_two_ranks(
    loss: MarginLoss, rows: tuple[torch.Tensor, ...], cut: int, max_positives: int | None = 2
) -> list[tuple[LearnerSums, torch.Tensor]]:
    """What the loss gives for rows before and after ``cut``, each on a thread that meets the other one to gather; and its own z."""
    meeting, brought = threading.Barrier(2, timeout=30), {}

    def rank(number: int) -> tuple[LearnerSums, torch.Tensor]:
        def gather(part: torch.Tensor) -> torch.Tensor:
            meeting.wait()
            brought[number] = part
            meeting.wait()
            return torch.cat([brought[0], brought[1]])

        own = slice(0, cut) if number == 0 else slice(cut, None)
        z = rows[0][own].clone().requires_grad_()
        mine = step_rows(z, *(column[own] for column in rows[1:]), kind=RowsOfThread, max_positives=max_positives)
        mine.__dict__.update(meet=gather, start=own.start)
        return loss.learner_sums(mine), z

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, range(2)))


@pytest.mark.parametrize("cut", [1, 5, 23])
@pytest.mark.parametrize("max_positives", [2, None])
def test_local_anchors_against_gathered_references_add_up(cut, max_positives):
    loss = make(8, nonzero_loss_cutoff=1.8, learn_beta="class")
    rows = batch()
    weights = torch.tensor([1.0, -0.3], dtype=torch.float64)  # a learner's gradient must reach its own rows only
    z = rows[0].clone().requires_grad_()
    whole = loss.learner_sums(step_rows(z, *rows[1:]))
    beta_gradient, gradient = torch.autograd.grad(whole.sums @ weights, [loss.beta, z])
    parts = on_two_ranks(loss, rows, cut, max_positives)
    assert torch.allclose(sum(out.sums for out, _ in parts), whole.sums)
    for name, value in whole.stats.items():
        assert sum(float(out.stats[name]) for out, _ in parts) == pytest.approx(float(value)), name
    gradients = [torch.autograd.grad(out.sums @ weights, [loss.beta, own]) for out, own in parts]
    assert gradient.abs().sum(1).min() > 0
    torch.testing.assert_close(torch.cat([of_rows for _, of_rows in gradients]), gradient)
    torch.testing.assert_close(gradients[0][0] + gradients[1][0], beta_gradient)


def test_classes_of_one_row_have_no_pairs_on_any_rank():
    z, _, learner, row_ids = batch()
    parts = on_two_ranks(make(24), (z, torch.arange(24), learner, row_ids), 7, max_positives=0)
    assert all(not out.counts.any() and not out.sums.any() for out, _ in parts)


def test_options_reach_the_sampling():
    rows = step_rows(*batch(), seed=0)
    far = make(8, nonzero_loss_cutoff=0.7, cutoff=0.6).learner_sums(rows)
    floors = make(8, nonzero_loss_cutoff=0.7, cutoff=0.6, mode="reference").learner_sums(rows)
    assert int(far.stats["negative_shortfall"]) > 0 and int(floors.stats["negative_shortfall"]) == 0


def build(name, options):
    return parts.build("loss", {"name": name, **options}, num_classes=5, embedding_dim=7)


def test_a_loss_is_built_by_name():
    loss = build("margin", {"margin": 0.3, "learn_beta": "class"})
    assert isinstance(loss, MarginLoss) and loss.options.margin == 0.3 and loss.beta.shape == (5,)
    proxies = build("proxy_anchor", {"scale": 16.0})
    assert isinstance(proxies, ProxyAnchorLoss) and proxies.proxies.shape == (5, 7)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("margn", {}, "did you mean margin"),
        ("margin", {"bta": 1}, "did you mean 'beta'"),
        ("proxy_anchor", {"beta": 1}, "beta: belongs to margin and multi_similarity, not to proxy_anchor; proxy_anchor has margin, scale"),
        ("margin", {"learn_beta": "yes"}, "'fixed', 'scalar' or 'class'"),
        ("margin", {"mode": "published"}, "'paper' or 'reference'"),
        ("margin", {"cutoff": 1.5}, "cutoff=1.5 must be below nonzero_loss_cutoff=1.4"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        build(name, options)
