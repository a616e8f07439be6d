"""Sampled pairs: which pairs, how many, drawn with the analytic weights, and independent of order and ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from pytorch_metric_learning.miners import DistanceWeightedMiner
from scipy.stats import chi2
from torch import Tensor
from torch.nn.functional import normalize

import dnc_kernels
from dnc_kernels import Rows, Sampling
from dnc_kernels.philox import draw_words, exponentials
from dnc_kernels.reference_columns import Windows

SIGNIFICANCE = 1e-4


def unit_rows(num_rows: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return normalize(torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def as_set(pairs: dnc_kernels.Pairs, anchor_ids: Tensor, other_ids: Tensor) -> set[tuple[int, int, bool]]:
    used = pairs.other >= 0
    columns = (anchor_ids[pairs.anchor[used]], other_ids[pairs.other[used]], pairs.positive[used])
    listed = list(zip(*(column.tolist() for column in columns), strict=True))
    assert len(listed) == len(set(listed)), "a pair was listed twice"
    return set(listed)


def brute_force_weight(a: Tensor, b: Tensor, n: float, cutoff: float = 0.5, nonzero_loss_cutoff: float = 1.4) -> float:
    d = max(float((a.double() - b.double()).norm()), cutoff)
    if d > nonzero_loss_cutoff:
        return 0.0
    return d ** (2.0 - n) * (1 - d * d / 4) ** (-(n - 3.0) / 2)


@pytest.mark.parametrize("mode", ["paper", "reference"])
@pytest.mark.parametrize("effective_dim", [None, 3, 2])
def test_weights_equal_the_loops(mode, effective_dim):
    z, labels, learner = unit_rows(18, 6), torch.arange(18) % 5, torch.tensor([0, 1, -1]).repeat(6)
    weights = dnc_kernels.negative_weights(Rows(z, labels, learner), sampling=Sampling(mode=mode, effective_dim=effective_dim))
    for i in range(18):
        different = [int(learner[i]) == int(learner[j]) >= 0 and bool(labels[i] != labels[j]) for j in range(18)]
        row = [brute_force_weight(z[i], z[j], effective_dim or 6) if ok else 0.0 for j, ok in enumerate(different)]
        largest = max(row) or 1.0
        row = [weight / largest for weight in row]
        if mode == "reference":
            row = [(weight + 1e-9 if weight else 1e-6) if ok else 0.0 for weight, ok in zip(row, different, strict=True)]
        assert weights[i].tolist() == pytest.approx(row, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("max_positives", [None, 9])
def test_pairs_equal_the_loops(max_positives):
    z, row_ids = unit_rows(40, 5), torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:40]
    labels, learner = torch.arange(40) % 7, torch.tensor([0, 0, 1, -1, 1]).repeat(8)
    pairs = dnc_kernels.sample_pairs(Rows(z, labels, learner, row_ids), sampling=Sampling(max_positives=max_positives, seed=3, step=4))
    assert pairs.stats is not None
    counts = dict.fromkeys(("anchors", "anchors_without_positives", "anchors_without_negatives", "negative_shortfall"), 0)
    for i in range(40):
        mine = pairs.anchor == i
        positives = sorted(pairs.other[mine & pairs.positive & (pairs.other >= 0)].tolist())
        negatives = pairs.other[mine & ~pairs.positive & (pairs.other >= 0)].tolist()
        together = [j for j in range(40) if j != i and int(learner[i]) == int(learner[j]) >= 0]
        expected = [j for j in together if labels[i] == labels[j]]
        candidates = [j for j in together if labels[i] != labels[j] and brute_force_weight(z[i], z[j], 5) > 0]
        assert positives == expected
        assert set(negatives) <= set(candidates) and len(set(negatives)) == len(negatives)
        assert len(negatives) == min(len(expected), len(candidates))
        if learner[i] >= 0:
            counts["anchors"] += 1
            counts["anchors_without_positives"] += not expected
            counts["anchors_without_negatives"] += not candidates
            counts["negative_shortfall"] += max(0, len(expected) - len(candidates))
    assert counts == {name: int(pairs.stats[name]) for name in counts}


def test_draws_do_not_depend_on_row_order_or_rank_slices():
    z, row_ids = unit_rows(90, 16), torch.randperm(10**6, generator=torch.Generator().manual_seed(2))[:90] + 2**33
    labels, learner = torch.arange(90) // 3 % 12, torch.arange(90) // 36
    whole = dnc_kernels.sample_pairs(Rows(z, labels, learner, row_ids), sampling=Sampling(seed=1, step=2))
    expected = as_set(whole, row_ids, row_ids)
    assert any(not positive for _, _, positive in expected)

    order = torch.randperm(90, generator=torch.Generator().manual_seed(3))
    shuffled = dnc_kernels.sample_pairs(Rows(z[order], labels[order], learner[order], row_ids[order]), sampling=Sampling(seed=1, step=2))
    assert as_set(shuffled, row_ids[order], row_ids[order]) == expected

    pieces = set()
    for start, stop in itertools.pairwise([0, 1, 40, 40, 73, 90]):
        own = slice(start, stop)
        part = dnc_kernels.sample_pairs(
            Rows(z[own], labels[own], learner[own], row_ids[own]),
            Rows(z[order], labels[order], learner[order], row_ids[order]),
            sampling=Sampling(max_positives=20, seed=torch.tensor(1), step=torch.tensor(2)),
        )
        pieces |= as_set(part, row_ids[own], row_ids[order])
    assert pieces == expected
    other_step = dnc_kernels.sample_pairs(Rows(z, labels, learner, row_ids), sampling=Sampling(seed=1, step=3))
    assert as_set(other_step, row_ids, row_ids) != expected


def test_a_learner_alone_draws_what_it_draws_among_others():
    z, labels, row_ids, learner = unit_rows(60, 8), torch.arange(60) % 9, torch.arange(60) * 7, torch.arange(60) % 2
    both = dnc_kernels.sample_pairs(Rows(z, labels, learner, row_ids), sampling=Sampling(seed=5))
    second = learner == 1
    alone = dnc_kernels.sample_pairs(Rows(z[second], labels[second], row_ids=row_ids[second]), sampling=Sampling(seed=5))
    ids = set(row_ids[second].tolist())
    expected = {pair for pair in as_set(both, row_ids, row_ids) if pair[0] in ids}
    assert as_set(alone, row_ids[second], row_ids[second]) == expected


def chi_square_p(observed: list[int], probability: list[float]) -> float:
    total = sum(observed)
    assert abs(sum(probability) - 1) < 1e-9 and all(p * total > 5 for p in probability), "bins too small for the test"
    statistic = sum((o - total * p) ** 2 / (total * p) for o, p in zip(observed, probability, strict=True))
    return float(chi2.sf(statistic, len(observed) - 1))


def one_anchor_many_times(num_positives: int, mode: str, repeats: int = 30000) -> tuple[Tensor, Tensor]:
    """Negatives drawn by `repeats` copies of one anchor under different row ids, (repeats, num_positives), and its weights."""
    dim, num_negatives = 5, 7
    references = unit_rows(num_positives + num_negatives, dim, seed=4)
    ref_labels = torch.cat([torch.zeros(num_positives, dtype=torch.int64), 1 + torch.arange(num_negatives)])
    anchor = unit_rows(1, dim, seed=9)
    anchors = Rows(anchor.expand(repeats, dim), torch.zeros(repeats, dtype=torch.int64), row_ids=1000 + torch.arange(repeats))
    others = Rows(references, ref_labels, row_ids=torch.arange(len(references)))
    sampling = Sampling(nonzero_loss_cutoff=1.6, mode=mode, seed=11, step=12)
    pairs = dnc_kernels.sample_pairs(anchors, others, sampling=sampling)
    first = Rows(anchor, anchors.labels[:1], row_ids=anchors.row_ids[:1])
    weights = dnc_kernels.negative_weights(first, others, sampling=sampling)[0]
    drawn = pairs.other.view(repeats, 2 * num_positives)[:, num_positives:]
    return drawn, weights / weights.sum()


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_a_single_draw_follows_the_weights(mode):
    drawn, probability = one_anchor_many_times(1, mode)
    observed = torch.bincount(drawn[:, 0], minlength=len(probability))
    likely = probability * len(drawn) > 5
    assert int(likely.sum()) >= 3 and int(observed[probability == 0].sum()) == 0
    rare = int(observed[~likely].sum())
    assert rare <= 5 * float(probability[~likely].sum()) * len(drawn) + 10
    kept = probability[likely] / probability[likely].sum()
    assert chi_square_p(observed[likely].tolist(), kept.tolist()) > SIGNIFICANCE


def test_two_draws_follow_the_weights_without_replacement():
    drawn, probability = one_anchor_many_times(2, "paper")
    first, second = drawn.unbind(1)
    assert bool((first != second).all())
    observed, expected, rest, rest_probability = [], [], 0, 0.0
    for i, j in itertools.permutations(torch.nonzero(probability)[:, 0].tolist(), 2):
        p = float(probability[i] * probability[j] / (1 - probability[i]))
        count = int(((first == i) & (second == j)).sum())
        if p * len(drawn) > 5:
            observed.append(count)
            expected.append(p)
        else:
            rest, rest_probability = rest + count, rest_probability + p
    if rest_probability * len(drawn) > 5:
        observed.append(rest)
        expected.append(rest_probability)
    total = math.fsum(expected)
    assert chi_square_p(observed, [p / total for p in expected]) > SIGNIFICANCE


def test_draws_of_different_steps_are_independent():
    z, labels = unit_rows(12, 4, seed=6), torch.arange(12) // 2
    chosen = []
    for step in range(600):
        pairs = dnc_kernels.sample_pairs(Rows(z, labels), sampling=Sampling(nonzero_loss_cutoff=1.9, max_positives=1, step=step))
        chosen.append(pairs.other.view(12, 2)[0, 1])
    weights = dnc_kernels.negative_weights(Rows(z, labels), sampling=Sampling(nonzero_loss_cutoff=1.9))[0]
    probability = weights / weights.sum()
    observed = torch.bincount(torch.stack(chosen), minlength=12)
    likely = probability * 600 > 5
    groups = [*observed[likely].tolist(), int(observed[~likely].sum())]
    shares = [*probability[likely].tolist(), float(probability[~likely].sum())]
    if shares[-1] * 600 <= 5:
        groups, shares = groups[:-1], [p / sum(shares[:-1]) for p in shares[:-1]]
    assert chi_square_p(groups, shares) > SIGNIFICANCE


@pytest.mark.parametrize("dim", [64, 128, 256, 512, 1024])
def test_no_anchor_is_lost(dim):
    labels = torch.arange(112) // 4
    z = unit_rows(112, dim)
    other = normalize(z[4] - (z[4] @ z[0]) * z[0], dim=0)  # row 4 becomes an impostor at distance 0.5 of row 0
    angle = 2 * math.asin(0.25)
    z[4] = math.cos(angle) * z[0] + math.sin(angle) * other
    assert float((z[4] - z[0]).norm()) == pytest.approx(0.5, abs=1e-5)
    pairs = dnc_kernels.sample_pairs(Rows(z, labels), sampling=Sampling(nonzero_loss_cutoff=1.99))
    negatives = torch.bincount(pairs.anchor[~pairs.positive & (pairs.other >= 0)], minlength=112)
    assert negatives.tolist() == [3] * 112
    assert pairs.stats is not None and int(pairs.stats["anchors_without_negatives"]) == int(pairs.stats["negative_shortfall"]) == 0
    if dim == 512:  # the peer subtracts one maximum for all rows: nearly all others underflow, and are dropped
        kept = DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.99)(z, labels)[0].unique()
        assert len(kept) < 10


def stats_of(pairs: dnc_kernels.Pairs) -> dict[str, int]:
    assert pairs.stats is not None
    return {name: int(value) for name, value in pairs.stats.items()}


@pytest.mark.parametrize("num_rows", [0, 1])
def test_too_few_rows(num_rows):
    pairs = dnc_kernels.sample_pairs(
        Rows(unit_rows(num_rows, 4), torch.zeros(num_rows, dtype=torch.int64)), sampling=Sampling(max_positives=3)
    )
    assert not (pairs.other >= 0).any()
    assert stats_of(pairs)["anchors_without_positives"] == num_rows


def test_one_class_has_no_negatives():
    stats = stats_of(dnc_kernels.sample_pairs(Rows(unit_rows(6, 4), torch.zeros(6, dtype=torch.int64))))
    assert (stats["anchors_without_positives"], stats["anchors_without_negatives"], stats["negative_shortfall"]) == (0, 6, 30)


def test_no_positives():
    pairs = dnc_kernels.sample_pairs(Rows(unit_rows(6, 4), torch.arange(6)))
    assert stats_of(pairs)["anchors_without_positives"] == 6 and not (pairs.other >= 0).any()


def test_positives_over_the_limit_are_counted():
    stats = stats_of(
        dnc_kernels.sample_pairs(Rows(unit_rows(8, 4), torch.arange(8) // 4), sampling=Sampling(nonzero_loss_cutoff=2.0, max_positives=2))
    )
    assert stats["positives_over_limit"] == 8


def test_nobody_in_a_learner():
    pairs = dnc_kernels.sample_pairs(
        Rows(unit_rows(5, 4), torch.zeros(5, dtype=torch.int64), torch.full((5,), -1)), sampling=Sampling(max_positives=2)
    )
    assert not (pairs.other >= 0).any() and not any(stats_of(pairs).values())


def test_rows_without_finite_values_and_zero_rows_are_counted_and_in_no_pair():
    z = unit_rows(12, 4).clone()
    z[3, 1], z[5, 0], z[7] = torch.nan, torch.inf, 0.0
    pairs = dnc_kernels.sample_pairs(Rows(z, torch.arange(12) // 4), sampling=Sampling(nonzero_loss_cutoff=2.0))
    stats = stats_of(pairs)
    assert (stats["non_finite_rows"], stats["zero_rows"], stats["anchors"]) == (2, 1, 9)
    used = pairs.other >= 0
    assert not set(pairs.other[used].tolist() + pairs.anchor[used].tolist()) & {3, 5, 7}


@pytest.mark.parametrize("mode", ["paper", "reference"])
@pytest.mark.parametrize("dim", [2, 16, 512])
def test_duplicates_and_antipodes_have_finite_weights(mode, dim):
    z = unit_rows(2, dim).repeat(3, 1)
    z = torch.cat([z, -z])
    labels = torch.arange(12) % 3
    weights = dnc_kernels.negative_weights(Rows(z, labels), sampling=Sampling(nonzero_loss_cutoff=2.0 + 1e-6, mode=mode))
    assert bool(torch.isfinite(weights).all()) and bool((weights >= 0).all())
    assert (
        stats_of(dnc_kernels.sample_pairs(Rows(z, labels), sampling=Sampling(nonzero_loss_cutoff=2.0 + 1e-6, mode=mode)))[
            "negative_shortfall"
        ]
        == 0
    )


def keys_of_the_contract(anchors: Rows, references: Rows | None, sampling: Sampling) -> Tensor:
    """log w - log E (B, G) in float64, as the contract says it: all rows with all rows, one position after the other."""
    others = anchors if references is None else references
    columns = sorted(
        range(len(others.labels)), key=lambda j: tuple(int(column[j]) for column in (others.learner, others.labels, others.row_ids))
    )
    seen: dict[int, int] = {}
    words = draw_words(anchors.row_ids, len(columns), sampling.seed, sampling.step)
    waiting = torch.empty(words.shape, dtype=torch.float64)
    for j in columns:
        position = seen.setdefault(int(others.learner[j]), 0)
        waiting[:, j] = exponentials(words[:, position])
        seen[int(others.learner[j])] += 1
    return dnc_kernels.negative_weights(anchors, references, sampling=sampling).log() - waiting.log()


def all_columns(windows: Windows, num_columns: int) -> Iterator[tuple[slice, None]]:
    """The blocks of a GPU, where nobody waits to learn where a learner ends."""
    return ((slice(start, start + 9), None) for start in range(0, len(windows.learner), 9))


@pytest.mark.parametrize("blocks", ["each learner", "all together", "all columns"])
@pytest.mark.parametrize("mode", ["paper", "reference"])
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("sliced", [False, True])
def test_draws_have_the_largest_keys(monkeypatch, blocks, mode, broken, sliced):
    if blocks == "each learner":
        monkeypatch.setattr("dnc_kernels.reference_sampling.BLOCK_ELEMENTS", 1000)
    elif blocks == "all columns":
        monkeypatch.setattr("dnc_kernels.reference_sampling._blocks", all_columns)
    z = unit_rows(120, 16).clone()
    if broken:  # a row that can be in no pair still has its position
        z[::7], z[3], z[11, 2] = 0.0, torch.nan, torch.inf
    random = torch.Generator().manual_seed(8)
    labels, learner = torch.randint(-3, 9, (120,), generator=random), torch.randint(-1, 3, (120,), generator=random)
    row_ids = torch.randperm(10**6, generator=random)[:120] - 10**5
    rows = Rows(z, labels, learner, row_ids)
    anchors, references = (Rows(*(column[10:50] for column in rows)), rows) if sliced else (rows, None)
    sampling = Sampling(mode=mode, nonzero_loss_cutoff=1.6, seed=5, step=6)
    pairs = dnc_kernels.sample_pairs(anchors, references, sampling=sampling)
    drawn = pairs.other.view(len(anchors.labels), -1).chunk(2, 1)[1]
    keys = keys_of_the_contract(anchors, references, sampling)
    assert (drawn >= 0).sum() >= 40
    for row, key in zip(drawn, keys, strict=True):
        chosen = row[row >= 0]
        assert torch.equal(chosen, key.topk(len(chosen)).indices)


def test_large_batches_are_worked_off_in_blocks(monkeypatch):
    z, labels = unit_rows(50, 8), torch.arange(50) // 4
    whole = dnc_kernels.sample_pairs(Rows(z, labels))
    monkeypatch.setattr("dnc_kernels.reference_sampling.BLOCK_ELEMENTS", 350)
    blocked = dnc_kernels.sample_pairs(Rows(z, labels))
    assert torch.equal(whole.other, blocked.other) and torch.equal(whole.anchor, blocked.anchor)
    assert stats_of(whole) == stats_of(blocked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "labels must hold 6 integers"),
        ({"labels": torch.zeros(6)}, "labels must hold 6 integers"),
        ({"z": torch.zeros(6, dtype=torch.int64)}, "z must be a floating-point matrix"),
        ({"learner": torch.zeros(2, dtype=torch.int64)}, "learner must hold 6 integers"),
    ],
)
def test_wrong_rows_are_refused(change, message):
    rows = Rows(unit_rows(6, 4), torch.arange(6) // 2)._replace(**change)
    with pytest.raises(ValueError, match=message):
        dnc_kernels.sample_pairs(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_ids": None}, "need row_ids"),
        ({"z": torch.zeros(6, 3)}, "references.z must be 4 wide"),
        ({"labels": torch.zeros(6)}, "references.labels must hold 6 integers"),
        ({"learner": torch.zeros(6, dtype=torch.int64)}, "both have a learner, or neither"),
    ],
)
def test_wrong_references_are_refused(change, message):
    rows = Rows(unit_rows(6, 4), torch.arange(6) // 2, row_ids=torch.arange(6))
    with pytest.raises(ValueError, match=message):
        dnc_kernels.sample_pairs(rows, rows._replace(**change))


@pytest.mark.parametrize(
    ("constant", "message"),
    [
        ({"mode": "papre"}, "allowed are paper, reference"),
        ({"cutoff": 0.0}, "between 0 and 2"),
        ({"nonzero_loss_cutoff": 0.4}, "must lie above cutoff"),
        ({"effective_dim": 0}, "1 or more"),
        ({"max_positives": -1}, "0 or more"),
    ],
)
def test_wrong_constants_are_refused(constant, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**constant)
