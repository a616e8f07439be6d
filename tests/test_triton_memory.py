"""The margin loss with cross-batch memory on the Triton kernels: more references than anchors, images that are there several times."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

import dnc_kernels
from dnc_dist.loss.base import StepRows
from dnc_dist.loss.margin import MarginLoss
from tests.rounding import EPS
from tests.test_triton_sampling import DEVICE, assert_same

ROWS, DIM, CLASSES, SIZE = 12, 8, 5, 30


def _loss_and_steps(count: int) -> tuple[MarginLoss, list[StepRows]]:
    """Steps of two learners over 20 images, some of which cannot be decoded; the last one meets a ring that is not full."""
    loss = MarginLoss(MarginLoss.Options(memory=SIZE, nonzero_loss_cutoff=1.9), num_classes=CLASSES, embedding_dim=DIM).to(DEVICE)
    numbers, steps = torch.Generator().manual_seed(2), []
    for step in range(count):
        row_ids = torch.randperm(20, generator=numbers)[:ROWS]
        learner = torch.where(torch.rand(ROWS, generator=numbers) < 0.2, -1, row_ids % CLASSES % 2)
        z = normalize(torch.randn(ROWS, DIM, generator=numbers)).to(DEVICE).requires_grad_()
        columns = {"labels": row_ids % CLASSES, "learner": learner, "row_ids": row_ids}
        columns = {name: value.to(DEVICE) for name, value in columns.items()}
        steps.append(StepRows(z, None, **columns, num_learners=2, seed=3, step=step, rows_of_ranks=[ROWS]))
    return loss, steps


@pytest.mark.parametrize("count", [3, 5])
def test_the_kernels_draw_from_batch_and_memory_what_the_reference_draws(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    loss, steps = _loss_and_steps(count)
    for rows in steps[:-1]:
        loss.of_step(rows)
    rows = steps[-1]
    references = loss.references(rows, "none")
    assert len(references.z) == ROWS + SIZE and bool((references.learner[ROWS:] < 0).any()) == (count == 3)
    anchors = dnc_kernels.Rows(rows.z.detach().cpu(), rows.labels.cpu(), rows.learner.cpu(), rows.row_ids.cpu())
    others = dnc_kernels.Rows(*(getattr(references, name).cpu() for name in ("z", "labels", "learner", "row_ids")))
    pairs = assert_same(anchors, others, nonzero_loss_cutoff=1.9, seed=3, step=rows.step, max_positives=SIZE + ROWS)
    assert int((pairs.other >= ROWS).sum()) > ROWS

    found = {}
    pairs = type(pairs)(*(column.to(DEVICE) for column in pairs[:3]))
    for kind in ("reference", "triton"):
        monkeypatch.setenv("DNC_KERNELS", kind)
        batch = dnc_kernels.Rows(rows.z, rows.labels, rows.learner)
        out = dnc_kernels.margin_loss_on_pairs(batch, pairs, references.z, beta=loss.beta, num_learners=2)
        found[kind] = (out.loss_sum, *torch.autograd.grad(out.loss_sum, rows.z))
    terms = len(pairs.other)
    for reference, triton in zip(*found.values(), strict=True):
        # A sum of so many terms of size 2 at most, each wrong by some eps.
        torch.testing.assert_close(triton, reference, rtol=0, atol=8 * terms * EPS)


def test_a_step_with_memory_runs_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path, with the way back to rows that others drew."""
    found = {}
    for kind in ("reference", "triton"):
        monkeypatch.setenv("DNC_KERNELS", kind)
        loss, steps = _loss_and_steps(4)
        found[kind] = [loss.of_step(rows)[1] for rows in steps]
    for reference, triton in zip(*found.values(), strict=True):
        assert reference.keys() <= triton.keys() and triton["anchors"] == reference["anchors"]
        # Two draws differ at near ties only, where one pair stands for another of the same learner.
        assert abs(int(triton["active_pairs"]) - int(reference["active_pairs"])) <= 2
        assert int(triton["anchors_without_positives"]) == int(reference["anchors_without_positives"])
