"""Triton projection and margin loss against the float64 reference: values, every gradient, the edges, the operators."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import normalize

import dnc_kernels
from dnc_kernels import Pairs, Rows, Sampling, reference
from dnc_kernels import margin as kernels
from dnc_kernels import margin_operators as operators
from dnc_kernels.contract import MarginLossOutput
from dnc_kernels.grouping import group
from dnc_kernels.masked_gradient import masked_pair_gradient
from dnc_kernels.pair_gradient import pair_gradient
from dnc_kernels.pair_loss import PairList, Tile, pair_loss
from dnc_kernels.projection import Projected, project_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 1e-5


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def integers(low: int, high: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def random_pairs(num_anchors: int, num_references: int, count: int) -> Pairs:
    """A flat list with duplicates and empty slots."""
    return Pairs(integers(0, num_anchors, count, 1), integers(-1, num_references, count, 2), integers(0, 2, count, 3) > 0)


def leaf(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return value.detach().clone().to(dtype or value.dtype).requires_grad_()


def assert_close(actual: Tensor | None, expected: Tensor | None, tolerance: float = TOLERANCE) -> None:
    assert actual is not None and expected is not None and actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = float(expected.norm()) or 1.0
    assert float((actual - expected).norm()) <= tolerance * scale


def assert_same_output(actual: MarginLossOutput, expected: MarginLossOutput) -> None:
    assert_close(actual.loss_sum, expected.loss_sum)
    assert_close(actual.learner_loss_sum, expected.learner_loss_sum)
    assert actual.loss_sum.dtype == torch.float32 and actual.stats.keys() == expected.stats.keys()
    assert torch.equal(actual.num_active, expected.num_active) and torch.equal(actual.learner_num_active, expected.learner_num_active)
    for name, value in expected.stats.items():
        assert not actual.stats[name].requires_grad and actual.stats[name].shape == ()
        if value.is_floating_point():
            assert_close(actual.stats[name], value)
        else:
            assert int(actual.stats[name]) == int(value), name


def weighted(out: MarginLossOutput) -> Tensor:
    """A loss whose gradient differs between learners."""
    return (out.learner_loss_sum * torch.arange(1, out.learner_loss_sum.shape[0] + 1, device=DEVICE)).sum() + 0.5 * out.loss_sum


# --- grouping ---


@pytest.mark.parametrize("counted_up_to", [0, 10_000])
@pytest.mark.parametrize(("count", "num_groups"), [(0, 3), (1, 1), (31, 4), (70, 7), (530, 100)])
def test_groups_are_in_order_and_stable(count, num_groups, counted_up_to):
    keys = integers(-1, num_groups, count)
    order, starts = group(keys, num_groups, counted_up_to=counted_up_to)
    assert torch.equal(order, keys.argsort(stable=True))
    assert starts.tolist() == [int((keys < g).sum()) for g in range(num_groups + 1)]


# --- projection ---


@pytest.mark.parametrize("masked", ["no", "one", "learners"])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (37, 5), (13, 17), (33, 64), (5, 130)])
def test_projection_and_its_gradients(rows, dim, masked):
    learner = integers(-1, 3, rows) if masked == "learners" else None
    embeddings, masks, upstream = random(rows, dim), random(3, dim, seed=1), random(rows, dim, seed=2)
    found = []
    for module, dtype in ((kernels, torch.float32), (reference, torch.float64)):
        e, m = leaf(embeddings, dtype), leaf(masks, dtype)
        z = module.project(e, learner, None if masked == "no" else m)
        (z * upstream).sum().backward()
        found.append([z, e.grad, *([] if masked == "no" else [m.grad])])
    # The gradient of a row that is about as long as its noise is all cancellation, hence the looser bound for D = 1.
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected) if dim > 1 else torch.testing.assert_close(actual, expected.float(), atol=1e-6, rtol=1e-5)


def test_projection_of_a_row_that_its_mask_wipes_out_and_of_nan():
    embeddings, masks = random(4, 20), torch.cat([-torch.ones(1, 20), torch.ones(1, 20)]).to(DEVICE)
    embeddings[3, 7] = torch.nan
    e, m = leaf(embeddings), leaf(masks)
    z = kernels.project(e, torch.tensor([0, 1, -1, 1], device=DEVICE), m)
    z[:3].sum().backward()
    assert not z[0].any() and not z[2].any() and float(z[1].detach().norm()) == pytest.approx(1.0) and bool(z[3].isnan().all())
    assert not e.grad[0].any() and not e.grad[2].any() and bool(torch.isfinite(e.grad[:3]).all())
    assert not m.grad[0].any()


def test_projection_takes_strided_rows_and_half_precision():
    wide, learner = random(24, 80), integers(0, 2, 24)
    embeddings, masks = wide[::2, ::2], random(2, 40, seed=1)
    assert_close(kernels.project(embeddings, learner[::2], masks), reference.project(embeddings.double(), learner[::2], masks.double()))
    e, m = leaf(embeddings, torch.bfloat16), leaf(masks, torch.bfloat16)
    expected_e, expected_m = leaf(e, torch.float64), leaf(m, torch.float64)
    z, expected = kernels.project(e, learner[::2], m), reference.project(expected_e, learner[::2], expected_m)
    assert z.dtype == torch.float32
    assert_close(z, expected)
    weights = random(12, 40, seed=5)
    (z * weights).sum().backward(), (expected * weights).sum().backward()
    assert e.grad.dtype == m.grad.dtype == torch.bfloat16
    assert_close(e.grad, expected_e.grad, 1e-2)
    assert_close(m.grad, expected_m.grad, 1e-2)


def test_the_gradient_of_masks_for_several_chunks():
    embeddings, masks, dz, learner = random(41, 20), random(3, 20, seed=1), random(41, 20, seed=2), integers(-1, 3, 41)
    z, inverse_norm = operators.project_op(embeddings, learner, masks)
    for rows in (1, 3, 64):
        found = project_backward(dz, Projected(z, inverse_norm, embeddings, learner, masks), per_chunk=rows)
        e, m = leaf(embeddings, torch.float64), leaf(masks, torch.float64)
        (reference.project(e, learner, m) * dz).sum().backward()
        assert_close(found[0], e.grad)
        assert_close(found[1], m.grad)


# --- loss over a list of pairs ---


@pytest.mark.parametrize("boundary", ["number", "scalar", "class"])
@pytest.mark.parametrize(
    ("rows", "references", "dim", "count", "learners"), [(11, None, 5, 60, 3), (17, 23, 17, 90, 5), (3, 20, 130, 50, 1)]
)
def test_loss_and_gradients_on_given_pairs(rows, references, dim, count, learners, boundary):
    z, ref_z = normalize(random(rows, dim)), None if references is None else normalize(random(references, dim, seed=4))
    labels, learner = integers(0, 4, rows), integers(-1, learners, rows) if learners > 1 else None
    pairs = random_pairs(rows, references or rows, count)
    found = []
    for module, dtype in ((kernels, torch.float32), (reference, torch.float64)):
        leaves = [leaf(z, dtype)] + ([] if ref_z is None else [leaf(ref_z, dtype)])
        beta = {"number": 1.15, "scalar": torch.tensor(1.2), "class": 1.2 + 0.1 * torch.arange(4)}[boundary]
        if isinstance(beta, Tensor):
            leaves.append(beta := leaf(beta.to(DEVICE), dtype))
        out = module.margin_loss_on_pairs(
            Rows(leaves[0], labels, learner), pairs, None if ref_z is None else leaves[1], beta=beta, num_learners=learners
        )
        found.append((out, torch.autograd.grad(weighted(out), leaves)))
    (actual, gradients), (expected, expected_gradients) = found
    assert_same_output(actual, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_the_wanted_gradient(wanted):
    pairs, labels = random_pairs(9, 12, 60), integers(0, 3, 9)
    values = [normalize(random(9, 16)), normalize(random(12, 16, seed=1)), torch.tensor([1.2, 1.1, 1.3], device=DEVICE)]
    found = []
    for module, dtype in ((kernels, torch.float32), (reference, torch.float64)):
        given = [value.detach().clone().to(dtype).requires_grad_(i == wanted) for i, value in enumerate(values)]
        out = module.margin_loss_on_pairs(Rows(given[0], labels), pairs, given[1], beta=given[2])
        out.loss_sum.backward()
        assert all((value.grad is not None) == (i == wanted) for i, value in enumerate(given))
        found.append(given[wanted].grad)
    assert_close(*found)


def test_the_gradient_is_zero_at_distance_zero():
    z = leaf(normalize(random(1, 4)).repeat(4, 1))
    pairs = Pairs(*(torch.tensor(x, device=DEVICE) for x in ([0, 0, 1], [1, 2, 3], [True, False, False])))
    out = kernels.margin_loss_on_pairs(
        Rows(z, torch.zeros(4, dtype=torch.int64, device=DEVICE)), pairs, beta=torch.tensor([1.2], device=DEVICE)
    )
    out.loss_sum.backward()
    assert int(out.num_active) == 2 and not z.grad.any()


def test_a_row_that_is_nan_reaches_only_the_rows_paired_with_it():
    z = normalize(random(6, 8))
    z[0] = torch.nan
    for others, poisoned in (([1, 2, -1], []), ([1, 2, 0], [0, 5])):
        x = leaf(z)
        pairs = Pairs(torch.tensor([3, 4, 5], device=DEVICE), torch.tensor(others, device=DEVICE), torch.tensor([True] * 3, device=DEVICE))
        out = kernels.margin_loss_on_pairs(Rows(x, torch.zeros(6, dtype=torch.int64, device=DEVICE)), pairs, beta=0.5)
        out.loss_sum.backward()
        assert bool(out.loss_sum.isnan()) == bool(poisoned) and int(out.num_active) == 2
        assert x.grad.isnan().any(1).nonzero().flatten().tolist() == poisoned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_even_under_autocast(dtype):
    z, labels, pairs = leaf(normalize(random(14, 24)), dtype), integers(0, 3, 14), random_pairs(14, 14, 60)
    expected_z = leaf(z, torch.float64)
    expected = reference.margin_loss_on_pairs(Rows(expected_z, labels), pairs, beta=1.2)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = kernels.margin_loss_on_pairs(Rows(z, labels), pairs, beta=1.2)
    assert_same_output(out, expected)
    out.loss_sum.backward(), expected.loss_sum.backward()
    assert z.grad.dtype == dtype
    assert_close(z.grad, expected_z.grad, 1e-2)


def test_labels_beyond_beta_make_the_loss_nan_and_are_counted():
    labels, learner = torch.tensor([0, 5, -1, 1, 9], device=DEVICE), torch.tensor([0, 0, 0, 0, -1], device=DEVICE)
    z, beta, pairs = normalize(random(5, 8)), torch.full((2,), 1.2, device=DEVICE), random_pairs(5, 5, 40)
    # The operator itself: the public function checks values on CPU.
    out = operators.pair_loss_op(
        z, None, None, None, beta, None, labels, learner, pairs.other, pairs.anchor, pairs.positive, None, None, 0.2, 1
    )
    assert bool(out[0].isnan().all()) and int(out[2][5]) == 2


def test_a_learner_beyond_the_masks_makes_its_rows_nan():
    # Below the public functions, as on a GPU, where they read no value.
    embeddings, masks, learner = random(6, 8), random(2, 8, seed=1), torch.tensor([0, 1, 2, -1, 0, 7], device=DEVICE)
    z, inverse_norm = operators.project_op(embeddings, learner, masks)
    assert z.isnan().any(1).tolist() == [False, False, True, False, False, True]
    gradient, _ = project_backward(z, Projected(z, inverse_norm, embeddings, learner, masks))
    assert gradient.isnan().any(1).tolist() == [False, False, True, False, False, True]


# --- sampling, loss and projection in one ---


def step(rows: int, dim: int, learners: int, per_class: int = 4) -> tuple[Rows, Tensor, Tensor]:
    """Raw embeddings in random row order, masks and beta of a step."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    labels = order // per_class
    centres = random(rows // per_class + 1, dim, seed=1)
    return (
        Rows(centres[labels] + random(rows, dim), labels, labels % learners, order * 3),
        random(learners, dim, seed=2) + 1.0,
        1.2 + 0.1 * random(rows // per_class + 1, seed=3),
    )


@pytest.mark.parametrize(
    ("rows", "dim", "learners", "positives", "masks_gradient"),
    [(24, 8, 2, None, True), (29, 33, 3, 5, True), (29, 33, 3, 5, False), (7, 5, 1, 3, True), (10, 64, 4, 0, True)],
)
def test_the_whole_step_equals_the_reference_on_the_same_pairs(rows, dim, learners, positives, masks_gradient):
    rows, masks, beta = step(rows, dim, learners)
    rows.learner[0] = -1
    sampling = Sampling(nonzero_loss_cutoff=1.9, seed=3, step=4, max_positives=positives)
    e, m, b = leaf(rows.z), masks.clone().requires_grad_(masks_gradient), leaf(beta)
    actual = kernels.margin_loss(rows._replace(z=e), beta=b, masks=m, num_learners=learners, sampling=sampling)
    weighted(actual).backward()
    with torch.no_grad():
        pairs = kernels.sample_pairs(rows._replace(z=kernels.project(rows.z, rows.learner, masks)), sampling=sampling)
    expected_e, expected_m, expected_b = (leaf(value, torch.float64) for value in (rows.z, masks, beta))
    expected_rows = rows._replace(z=reference.project(expected_e, rows.learner, expected_m))
    expected = reference.margin_loss_on_pairs(expected_rows, pairs, beta=expected_b, num_learners=learners)
    weighted(expected).backward()
    assert_same_output(actual, expected)
    assert positives == 0 or int(actual.num_active) > 0
    assert_close(e.grad, expected_e.grad)
    assert_close(b.grad, expected_b.grad)
    if masks_gradient:
        assert_close(m.grad, expected_m.grad)
    else:
        assert m.grad is None


def test_without_masks_and_with_gathered_references():
    rows, _, beta = step(20, 12, 2)
    sampling = Sampling(nonzero_loss_cutoff=1.9)
    results = []
    for bounds in ([0, 20], [0, 7, 7, 20]):
        x, b = leaf(rows.z), leaf(beta)
        whole = rows._replace(z=normalize(x))
        sums, active = torch.zeros(2, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
        for start, stop in itertools.pairwise(bounds):
            own = Rows(*(column[start:stop] for column in whole))
            out = kernels.margin_loss(own, whole if len(bounds) > 2 else None, beta=b, num_learners=2, sampling=sampling)
            sums, active = sums + out.learner_loss_sum, active + out.learner_num_active
        (sums / active).sum().backward()
        results.append((sums.detach(), x.grad, b.grad, active))
    assert torch.equal(results[0][3], results[1][3]) and bool((results[0][3] > 0).all())
    for at_once, in_slices in zip(results[0][:3], results[1][:3], strict=True):
        assert_close(at_once, in_slices)
    unit = rows._replace(z=normalize(rows.z))
    pairs = kernels.sample_pairs(unit, sampling=sampling)
    expected = reference.margin_loss_on_pairs(unit._replace(z=unit.z.double()), pairs, beta=beta.double(), num_learners=2)
    assert_close(results[0][0], expected.learner_loss_sum)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", ["left out", "single row", "one class", "nothing", "duplicates"])
def test_steps_without_pairs_stay_connected_to_the_graph(case, masked):
    rows = {"single row": 1, "nothing": 0}.get(case, 4)
    z = leaf(normalize(random(rows, 4)) if case != "duplicates" else normalize(random(1, 4)).repeat(4, 1))
    beta, masks = leaf(torch.tensor(1.2, device=DEVICE)), leaf(torch.ones(3, 4, device=DEVICE))
    labels = torch.arange(rows, device=DEVICE) // 2 if case == "duplicates" else torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    learner = torch.full((rows,), -1 if case == "left out" else 0, device=DEVICE)
    rows, sampling = Rows(z, labels, learner), Sampling(max_positives=3)
    out = kernels.margin_loss(rows, beta=beta, masks=masks if masked else None, num_learners=3, sampling=sampling)
    out.loss_sum.backward()
    leaves = [z, beta, *([masks] if masked else [])]
    assert all(value.grad is not None and bool(torch.isfinite(value.grad).all()) for value in leaves)
    if case != "one class":
        assert float(z.grad.abs().sum()) < 1e-6
    if case not in ("one class", "duplicates"):
        assert int(out.num_active) == 0 and float(out.loss_sum.detach()) == 0.0


# --- live columns ---


def sliced_step(rows: int, dim: int, learners: int) -> tuple[Rows, Tensor, Tensor]:
    """A step whose masks leave every learner dim / learners columns of its own."""
    embeddings, _, beta = step(rows, dim, learners)
    blocks = torch.arange(dim, device=DEVICE) * learners // dim
    return embeddings, (blocks == torch.arange(learners, device=DEVICE)[:, None]).float(), beta


@pytest.mark.parametrize("gathered", [False, True])
def test_sliced_masks_equal_the_reference(gathered):
    rows, masks, beta = sliced_step(24, 132, 3)
    sampling = Sampling(nonzero_loss_cutoff=1.9, effective_dim=44.0)
    e, b = leaf(rows.z), leaf(beta)
    projected = rows._replace(z=kernels.project(e, rows.learner, masks))
    pairs = kernels.sample_pairs(projected._replace(z=projected.z.detach()), sampling=sampling)
    if gathered:
        out = kernels.margin_loss(projected, projected, beta=b, num_learners=3, sampling=sampling)
    else:
        out = kernels.margin_loss(rows._replace(z=e), beta=b, num_learners=3, masks=masks, sampling=sampling)
    exact_e, exact_b = leaf(rows.z, torch.float64), leaf(beta, torch.float64)
    exact_rows = rows._replace(z=reference.project(exact_e, rows.learner, masks.double()))
    exact = reference.margin_loss_on_pairs(exact_rows, pairs, beta=exact_b, num_learners=3)
    assert int(exact.num_active) > 20
    assert_same_output(out, exact)
    for found, expected in zip(
        torch.autograd.grad(weighted(out), [e, b]), torch.autograd.grad(weighted(exact), [exact_e, exact_b]), strict=True
    ):
        assert_close(found, expected)


@pytest.mark.slow
def test_columns_that_no_row_uses_are_not_read():
    (embeddings, labels, learner, row_ids), masks, beta = sliced_step(18, 96, 3)
    z, inverse_norm = operators.project_op(embeddings, learner, masks)
    slots = kernels.sample_slots(Rows(z, labels, learner, row_ids), sampling=Sampling(nonzero_loss_cutoff=1.9))
    listed = PairList(slots.others, live=slots.live, ref_live=slots.live)
    poisoned = torch.where(masks[learner.clamp_min(0)] > 0, z, torch.nan)
    poisoned_embeddings = torch.where(masks[learner.clamp_min(0)] > 0, embeddings, torch.nan)
    upstream = torch.ones(3, device=DEVICE)
    found = []
    for rows, raw in ((z, embeddings), (poisoned, poisoned_embeddings)):
        out = pair_loss(Rows(rows, labels, learner), rows, listed, beta=beta, margin=0.2, num_learners=3)
        projected = Projected(rows, inverse_norm, raw, learner, masks)
        of_embeddings, of_masks, _ = masked_pair_gradient(upstream, out.coefficient, projected, listed)
        of_z, _, of_boundary = pair_gradient(upstream, out.coefficient, rows, None, learner, listed)
        found.append([*out, of_embeddings, of_masks, of_z, of_boundary])
    assert int(found[0][2][-1]) > 20
    assert all(torch.equal(clean, other) for clean, other in zip(*found, strict=True))


# --- tiles, repeated runs, operators ---


@pytest.mark.slow
def test_tile_shapes_agree_and_runs_repeat_bit_by_bit():
    (embeddings, labels, learner, _), masks, beta = step(13, 20, 2)
    z, inverse_norm = operators.project_op(embeddings, learner, masks)
    listed, upstream = PairList(integers(-1, 13, 78).view(13, 6)), torch.tensor([1.0, 2.0], device=DEVICE)
    rows, projected = Rows(z, labels, learner), Projected(z, inverse_norm, embeddings, learner, masks)
    losses = [
        pair_loss(rows, z, listed, beta=beta, margin=0.2, num_learners=2, tile=tile)
        for tile in (None, None, Tile(8, 16, 4), Tile(64, 64, 4))
    ]
    coefficient = losses[0].coefficient
    gradients = [
        (
            *masked_pair_gradient(upstream, coefficient, projected, listed, at_once=at_once, per_chunk=per_chunk),
            *pair_gradient(upstream, coefficient, z, None, learner, listed, at_once=at_once),
        )
        for at_once, per_chunk in ((None, None), (None, None), (1, 1), (4, 7))
    ]
    for found in (losses, gradients):
        assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
        for shaped in found[2:]:
            for a, b in zip(found[0], shaped, strict=True):
                assert_close(a, b, 1e-6)


@pytest.mark.slow
def test_torch_compile_gives_the_same_and_compiles_once(monkeypatch):
    monkeypatch.setenv("DNC_KERNELS", "triton")

    def loss(e: Tensor, m: Tensor, b: Tensor, rows: Rows, seed: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        sampling = Sampling(max_positives=3, seed=seed, step=number)
        out = dnc_kernels.margin_loss(rows._replace(z=e), beta=b, masks=m, num_learners=2, sampling=sampling)
        return out.learner_loss_sum, out.num_active

    rows, masks, beta = step(8, 16, 1)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for seed, number in ((1, 2), (5, 7)):
        words = [torch.full((), value, dtype=torch.int64, device=DEVICE) for value in (seed, number)]
        found = []
        for function in (loss, compiled):
            leaves = [leaf(value) for value in (rows.z, masks, beta)]
            sums, active = function(*leaves, rows, *words)
            found.append([sums, active, *torch.autograd.grad(sums.sum(), leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert counter.frame_count == 1


def test_the_operators_keep_their_promises():
    (embeddings, labels, learner, _), masks, beta = step(10, 8, 2)
    pairs, e, m = random_pairs(10, 10, 20), leaf(embeddings), leaf(masks)
    torch.library.opcheck(operators.project_op, (e, learner, m))
    z, inverse_norm = (value.detach() for value in operators.project_op(e, learner, m))
    flat = (leaf(z), None, None, None, leaf(beta), None, labels, learner, pairs.other, pairs.anchor, pairs.positive, None, None, 0.2, 2)
    torch.library.opcheck(operators.pair_loss_op, flat)
    padded = (z, None, e, m, leaf(beta), inverse_norm, labels, learner, pairs.other.view(10, 2), None, None, None, None, 0.2, 2)
    torch.library.opcheck(operators.pair_loss_op, padded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(6, 4, dtype=torch.float64)}, "z is torch.float64; the Triton kernels take"),
        ({"z": torch.zeros(6, 8200)}, "z is 8200 wide"),
        ({"beta": torch.ones(2, 2)}, "beta must be a number or one number per class"),
        ({"beta": torch.ones(2, dtype=torch.float64)}, "beta is torch.float64"),
        ({"pairs": Pairs(torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), torch.zeros(2))}, "equal length"),
        ({"ref_z": torch.zeros(6, 3)}, "ref_z must be 4 wide"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "labels must hold 6 integers"),
    ],
)
def test_wrong_input_is_refused(change, message):
    given = {"z": torch.zeros(6, 4), "labels": torch.arange(6) // 2, "pairs": random_pairs(6, 6, 4), "beta": 1.2} | change
    given = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        kernels.margin_loss_on_pairs(Rows(given.pop("z"), given.pop("labels")), **given)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="values are checked on CPU tensors only")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": torch.ones(2)}, "labels contains 2; allowed are 0 to 1, one per entry of beta"),
        ({"labels": torch.arange(6) - 1, "beta": torch.ones(6)}, "labels contains -1; allowed are 0 to 5"),
        ({"learner": torch.arange(6), "num_learners": 5}, "learner contains 5"),
        ({"pairs": Pairs(torch.tensor([6]), torch.tensor([0]), torch.tensor([True]))}, "pairs.anchor contains 6; allowed are 0 to 5"),
        ({"pairs": Pairs(torch.tensor([5]), torch.tensor([6]), torch.tensor([True]))}, "pairs.other contains 6; allowed are -1"),
    ],
)
def test_wrong_values_are_refused_on_cpu(change, message):
    given = {"labels": torch.arange(6) // 2, "learner": None, "pairs": random_pairs(6, 6, 4), "beta": 1.2} | change
    anchors = Rows(random(6, 4), given.pop("labels"), given.pop("learner"))
    with pytest.raises(ValueError, match=message):
        kernels.margin_loss_on_pairs(anchors, **given)
    with pytest.raises(ValueError, match="learner contains 2; allowed are -1"):
        kernels.project(random(3, 4), torch.arange(3), torch.ones(2, 4))


def test_masks_and_references_exclude_each_other():
    rows = Rows(random(4, 4), integers(0, 4, 4), row_ids=torch.arange(4, device=DEVICE))
    with pytest.raises(ValueError, match="project the embeddings first"):
        kernels.margin_loss(rows, rows, beta=1.2, masks=rows.z)
