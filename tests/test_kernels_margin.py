"""Projection and margin loss: loops, gradcheck, pytorch-metric-learning on the same pairs, and the edges."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from pytorch_metric_learning.losses import MarginLoss
from torch import Tensor
from torch.nn.functional import normalize

import dnc_kernels
from dnc_kernels import Pairs, Rows, Sampling


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_pairs(num_anchors: int, num_references: int, count: int, seed: int = 0) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    return Pairs(
        torch.randint(0, num_anchors, (count,), generator=generator),
        torch.randint(-1, num_references, (count,), generator=generator),
        torch.rand(count, generator=generator) < 0.5,
    )


def test_projection_equals_the_loops():
    embeddings, masks, learner = random(7, 6), random(3, 6, seed=1), torch.tensor([0, 2, 1, -1, 2, 0, 1])
    z = dnc_kernels.project(embeddings, learner, masks)
    for i in range(7):
        hidden = [max(0.0, float(m)) * float(e) for m, e in zip(masks[max(0, int(learner[i]))], embeddings[i], strict=True)]
        norm = sum(h * h for h in hidden) ** 0.5
        assert z[i].tolist() == pytest.approx([h / norm for h in hidden], rel=1e-12)
    assert torch.allclose(dnc_kernels.project(embeddings, None, None), normalize(embeddings))
    assert torch.autograd.gradcheck(lambda e, m: dnc_kernels.project(e, learner, m), (embeddings.requires_grad_(), masks.requires_grad_()))


def test_projection_of_a_row_that_its_mask_wipes_out():
    embeddings, masks = random(3, 4).requires_grad_(), torch.tensor([[-1.0] * 4, [1.0] * 4], dtype=torch.float64, requires_grad=True)
    z = dnc_kernels.project(embeddings, torch.tensor([0, 1, 0]), masks)
    z.sum().backward()
    assert not z[0].any() and float(z[1].detach().norm()) == pytest.approx(1.0)
    assert not embeddings.grad[0].any() and bool(torch.isfinite(embeddings.grad).all() and torch.isfinite(masks.grad).all())


def test_projection_computes_half_precision_in_float32_and_keeps_nan_visible():
    embeddings = random(2, 8, dtype=torch.float32).to(torch.bfloat16)
    assert dnc_kernels.project(embeddings, None, None).dtype == torch.float32
    embeddings[1, 3] = torch.nan
    assert bool(dnc_kernels.project(embeddings, None, None)[1].isnan().all())


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("rectangular", [False, True])
def test_loss_equals_the_loops(per_class, rectangular):
    num_references = 15 if rectangular else 10
    z, ref_z = normalize(random(10, 5)), normalize(random(15, 5, seed=1)) if rectangular else None
    labels, learner = torch.arange(10) % 4, torch.arange(10) % 3 - 1
    beta = 1.2 + 0.1 * torch.arange(4, dtype=torch.float64) if per_class else 1.15
    pairs = random_pairs(10, num_references, 80)
    out = dnc_kernels.margin_loss_on_pairs(Rows(z, labels, learner), pairs, ref_z, beta=beta, num_learners=2)
    sums, active, kinds = [0.0, 0.0], [0, 0], {True: [0, 0, 0.0], False: [0, 0, 0.0]}
    for anchor, other, positive in zip(*(column.tolist() for column in pairs[:3]), strict=True):
        if other < 0 or learner[anchor] < 0:
            continue
        distance = float((z[anchor] - (z if ref_z is None else ref_z)[other]).norm())
        boundary = float(beta[labels[anchor]]) if isinstance(beta, Tensor) else beta
        term = max(0.0, (distance - boundary if positive else boundary - distance) + 0.2)
        sums[learner[anchor]] += term
        active[learner[anchor]] += term > 0
        kind = kinds[positive]
        kind[0], kind[1], kind[2] = kind[0] + 1, kind[1] + (term > 0), kind[2] + distance
    assert out.learner_loss_sum.tolist() == pytest.approx(sums, rel=1e-12)
    assert out.learner_num_active.tolist() == active and int(out.num_active) == sum(active)
    assert float(out.loss_sum) == pytest.approx(sum(sums), rel=1e-12)
    for positive, word in ((True, "positive"), (False, "negative")):
        names = (f"{word}_pairs", f"active_{word}_pairs", f"{word}_distance_sum")
        assert [float(out.stats[name]) for name in names] == pytest.approx(kinds[positive], rel=1e-12)


@pytest.mark.parametrize("rectangular", [False, True])
def test_gradcheck(rectangular):
    z, ref_z, beta = random(6, 4), random(7, 4, seed=1), torch.tensor([1.3, 1.1, 1.2], dtype=torch.float64)
    labels, learner = torch.arange(6) % 3, torch.arange(6) % 2
    pairs = random_pairs(6, 7 if rectangular else 6, 30)

    def losses(z: Tensor, ref_z: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        references = ref_z if rectangular else None
        out = dnc_kernels.margin_loss_on_pairs(Rows(z, labels, learner), pairs, references, beta=beta, num_learners=2)
        return out.loss_sum, out.learner_loss_sum

    assert torch.autograd.gradcheck(losses, tuple(value.requires_grad_() for value in (z, ref_z, beta)))


@pytest.mark.parametrize("learn_beta", [False, True])
def test_equals_pytorch_metric_learning_on_the_same_pairs(learn_beta):
    raw, labels = random(24, 16), torch.arange(24) // 4
    with torch.no_grad():
        pairs = dnc_kernels.sample_pairs(Rows(normalize(raw), labels), sampling=Sampling(nonzero_loss_cutoff=1.9))
    used = pairs.other >= 0
    positives, negatives = used & pairs.positive, used & ~pairs.positive
    assert int(positives.sum()) == int(negatives.sum()) == 72
    peer = MarginLoss(margin=0.2, nu=0, beta=1.25, learn_beta=learn_beta, num_classes=6 if learn_beta else None).double()
    x = raw.clone().requires_grad_()
    # It keeps beta in float32, so beta is a number that float32 has.
    # Its pairs are (a1, p, a2, n), so that both lists can be given as they are.
    expected = peer(x, labels, (pairs.anchor[positives], pairs.other[positives], pairs.anchor[negatives], pairs.other[negatives]))
    expected.backward()

    y, beta = raw.clone().requires_grad_(), torch.full((6,), 1.25, dtype=torch.float64, requires_grad=True)
    out = dnc_kernels.margin_loss_on_pairs(Rows(normalize(y), labels), pairs, beta=beta)
    (out.loss_sum / out.num_active).backward()
    assert float((out.loss_sum / out.num_active).detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert torch.allclose(y.grad, x.grad, rtol=1e-12, atol=1e-14)
    if learn_beta:
        assert float(beta.grad.abs().max()) > 1e-4
        assert torch.allclose(beta.grad, peer.beta.grad, rtol=1e-12, atol=1e-14)


def test_fused_equals_its_parts():
    embeddings, masks, labels = random(30, 8), random(2, 8, seed=1).abs(), torch.arange(30) // 3
    learner = (torch.arange(30) // 15) % 2
    sampling = Sampling(seed=4, step=5)
    gradients = []
    for fused in (True, False):
        e, m = embeddings.clone().requires_grad_(), masks.clone().requires_grad_()
        if fused:
            out = dnc_kernels.margin_loss(Rows(e, labels, learner), beta=1.2, masks=m, num_learners=2, sampling=sampling)
        else:
            rows = Rows(dnc_kernels.project(e, learner, m), labels, learner)
            pairs = dnc_kernels.sample_pairs(rows, sampling=sampling)
            out = dnc_kernels.margin_loss_on_pairs(rows, pairs, beta=1.2, num_learners=2)
        out.loss_sum.backward()
        gradients.append((out.loss_sum.detach(), e.grad, m.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert "anchors_without_negatives" in out.stats and all(not value.requires_grad for value in out.stats.values())


def test_rank_slices_add_up_to_the_whole():
    raw, row_ids = random(24, 8), torch.arange(24) * 5
    labels, learner = torch.arange(24) // 3, torch.arange(24) // 12
    beta = torch.full((8,), 1.2, dtype=torch.float64)
    sampling = Sampling(nonzero_loss_cutoff=1.9, seed=8, step=9)
    results = []
    for bounds in ([0, 24], [0, 3, 3, 17, 24]):
        x, b = raw.clone().requires_grad_(), beta.clone().requires_grad_()
        whole = Rows(normalize(x), labels, learner, row_ids)
        sums, active = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
        for start, stop in itertools.pairwise(bounds):
            own = Rows(*(column[start:stop] for column in whole))
            out = dnc_kernels.margin_loss(own, whole, beta=b, num_learners=2, sampling=sampling)
            sums, active = sums + out.learner_loss_sum, active + out.learner_num_active
        (sums / active).sum().backward()
        results.append((sums.detach(), active, x.grad, b.grad))
    for at_once, in_slices in zip(*results, strict=True):
        assert torch.allclose(at_once, in_slices, rtol=1e-12, atol=1e-14)


def test_gradient_is_zero_at_distance_zero_and_never_nan():
    z = normalize(random(1, 4)).repeat(4, 1).requires_grad_()
    out = dnc_kernels.margin_loss(Rows(z, torch.tensor([0, 0, 1, 1])), beta=1.2)
    assert int(out.num_active) == int(out.stats["active_negative_pairs"]) == 4
    out.loss_sum.backward()
    assert not z.grad.any()


def test_antipodal_rows_have_finite_gradients():
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], requires_grad=True)
    out = dnc_kernels.margin_loss(Rows(z, torch.tensor([0, 0, 1, 1])), beta=1.2, sampling=Sampling(nonzero_loss_cutoff=2.0))
    out.loss_sum.backward()
    assert int(out.stats["negative_pairs"]) == 4 and bool(torch.isfinite(z.grad).all()) and bool(z.grad.any())


@pytest.mark.parametrize("case", ["left out", "single row", "one class", "nothing"])
def test_steps_without_pairs_stay_connected_to_the_graph(case):
    num_rows = {"left out": 4, "single row": 1, "one class": 4, "nothing": 0}[case]
    z, beta = normalize(random(num_rows, 4)).requires_grad_(), torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    labels = torch.zeros(num_rows, dtype=torch.int64)
    learner = torch.full((num_rows,), -1 if case == "left out" else 0)
    out = dnc_kernels.margin_loss(Rows(z, labels, learner), beta=beta, num_learners=3, sampling=Sampling(max_positives=3))
    out.loss_sum.backward()
    assert z.grad is not None and bool(torch.isfinite(z.grad).all()) and beta.grad is not None
    if case != "one class":
        assert not z.grad.any() and int(out.num_active) == 0


def test_a_nan_row_is_counted_and_does_not_reach_other_rows():
    z = normalize(random(8, 4)).clone()
    z[0] = torch.nan
    z.requires_grad_()
    out = dnc_kernels.margin_loss(Rows(z, torch.arange(8) // 4), beta=1.2, sampling=Sampling(nonzero_loss_cutoff=1.99))
    out.loss_sum.backward()
    assert int(out.stats["non_finite_rows"]) == 1
    assert bool(torch.isfinite(z.grad).all()) and not z.grad[0].any() and bool(z.grad[1:].any())


def test_half_precision_is_computed_in_float32_even_under_autocast():
    z = normalize(random(12, 16, dtype=torch.float32)).to(torch.bfloat16)
    labels = torch.arange(12) // 3
    expected = dnc_kernels.margin_loss(Rows(z.float(), labels), beta=1.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dnc_kernels.margin_loss(Rows(z, labels), beta=1.2)
    assert out.loss_sum.dtype == torch.float32 and float(out.loss_sum) == float(expected.loss_sum)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": torch.ones(2)}, "labels contains 2; allowed are 0 to 1, one per entry of beta"),
        ({"labels": torch.arange(6) - 1, "beta": torch.ones(6)}, "labels contains -1; allowed are 0 to 5"),
        ({"beta": torch.ones(2, 2)}, "beta must be a number or one number per class"),
        ({"learner": torch.arange(6), "num_learners": 5}, "learner contains 5"),
        ({"pairs": Pairs(torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), torch.zeros(2))}, "equal length"),
        ({"ref_z": torch.zeros(6, 3)}, "ref_z must be 4 wide"),
    ],
)
def test_wrong_input_is_refused(change, message):
    given = {"labels": torch.arange(6) // 2, "learner": None, "pairs": random_pairs(6, 6, 4), "beta": 1.2} | change
    anchors = Rows(random(6, 4), given.pop("labels"), given.pop("learner"))
    with pytest.raises(ValueError, match=message):
        dnc_kernels.margin_loss_on_pairs(anchors, **given)


def test_masks_and_references_exclude_each_other():
    rows = Rows(random(4, 4), torch.arange(4), row_ids=torch.arange(4))
    with pytest.raises(ValueError, match="project the embeddings first"):
        dnc_kernels.margin_loss(rows, rows, beta=1.2, masks=torch.ones(1, 4))


def test_learner_without_mask_is_refused():
    with pytest.raises(ValueError, match="learner contains 2; allowed are -1"):
        dnc_kernels.project(random(3, 4), torch.arange(3), torch.ones(2, 4))


@pytest.mark.parametrize("mode", ["paper", "reference"])
@pytest.mark.parametrize("rectangular", [False, True])
def test_no_value_is_read_off_the_cpu(mode, rectangular):
    # A meta tensor has no values: whatever would wait for a GPU (item, boolean indexing) raises on it.
    z, masks, beta = (torch.empty(*shape, device="meta", requires_grad=True) for shape in ((20, 8), (2, 8), (5,)))
    column = torch.empty(20, dtype=torch.int64, device="meta")
    number = torch.empty((), dtype=torch.int64, device="meta")
    rows, sampling = Rows(z, column, column, column), Sampling(mode=mode, max_positives=3, seed=number, step=number)
    options = {"references": rows if rectangular else None, "masks": None if rectangular else masks, "num_learners": 2}
    out = dnc_kernels.margin_loss(rows, beta=beta, sampling=sampling, **options)
    out.loss_sum.backward()
    assert out.learner_loss_sum.shape == (2,) and z.grad.shape == z.shape and all(value.is_meta for value in out.stats.values())
    assert all(value.is_meta for value in dnc_kernels.lloyd_step(z, masks, restrict=column))
    with pytest.raises(RuntimeError, match="meta"):  # counting the positives does read
        dnc_kernels.margin_loss(rows, beta=beta, sampling=replace(sampling, max_positives=None), **options)
