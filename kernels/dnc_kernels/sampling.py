"""`sample_pairs` in Triton kernels: order the rows, look at them once, list the positives, draw the negatives.

The steps stand in ordering.py, rows.py, positives.py and race.py; here they become one operator with the signature of
`reference_sampling.sample_pairs`, which is the specification.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dnc_kernels.contract import DEFAULT_SAMPLING, CheckedRows, Pairs, Rows, Sampling, anchors_and_references
from dnc_kernels.ordering import canonical_order
from dnc_kernels.positives import NUM_POSITIVES, Prepared, find_positives
from dnc_kernels.race import draw_negatives
from dnc_kernels.rows import num_parts, row_facts
from dnc_kernels.target import check_dtypes

STATS = (
    "anchors",
    "anchors_without_positives",
    "anchors_without_negatives",
    "negative_shortfall",
    "positives_over_limit",
    "non_finite_rows",
    "zero_rows",
)


class Slots(NamedTuple):
    """The drawn pairs, P slots for an anchor's positives and P for its negatives, -1 = empty; and which columns its rows use."""

    others: Tensor  # (B, 2P) int64, rows of the references
    stats: dict[str, Tensor]
    live: Tensor  # (B, 2) int32, see rows.py
    ref_live: Tensor  # (G, 2) int32, without references (0, 2)


def _prepare(own: CheckedRows, others: CheckedRows | None) -> Prepared:
    anchors = canonical_order(*own[1:])
    parts = max(num_parts(rows.z) for rows in (own, others) if rows is not None)
    anchor_facts = row_facts(own.z, anchors.order, parts)
    if others is None:
        return Prepared(anchors, anchor_facts, anchors, anchor_facts)
    references = canonical_order(*others[1:])
    return Prepared(anchors, anchor_facts, references, row_facts(others.z, references.order, parts))


@torch.library.custom_op("dnc_kernels::sample_pairs", mutates_args=())
def _sample_pairs(
    z: Tensor,
    labels: Tensor,
    learner: Tensor,
    row_ids: Tensor,
    ref_z: Tensor | None,
    ref_labels: Tensor | None,
    ref_learner: Tensor | None,
    ref_row_ids: Tensor | None,
    cutoff: float,
    nonzero_loss_cutoff: float,
    mode: str,
    effective_dim: float,
    max_positives: int,
    seed: Tensor,
    step: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of Slots; the counts named by STATS as (7,) int64."""
    references = None
    if ref_z is not None and ref_labels is not None and ref_learner is not None and ref_row_ids is not None:
        references = CheckedRows(ref_z, ref_labels, ref_learner, ref_row_ids)
    rows = _prepare(CheckedRows(z, labels, learner, row_ids), references)
    others = torch.full((z.shape[0], 2 * max_positives), -1, dtype=torch.int64, device=z.device)
    stats = torch.zeros(len(STATS), dtype=torch.int64, device=z.device)
    windows = find_positives(rows, others)
    sampling = Sampling(cutoff, nonzero_loss_cutoff, mode, effective_dim, max_positives, seed, step)
    draw_negatives(windows, rows, others, stats, effective_dim, sampling)
    live = rows.anchor_facts.live
    return others, stats, live, live.new_empty(0, 2) if references is None else rows.facts.live


@_sample_pairs.register_fake
def _(z: Tensor, labels: Tensor, learner: Tensor, row_ids: Tensor, ref_z: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    num_slots, _, _ = others[-3:]
    live, ref_live = (
        torch.empty(rows, 2, dtype=torch.int32, device=z.device) for rows in (z.shape[0], 0 if ref_z is None else ref_z.shape[0])
    )
    return labels.new_empty(z.shape[0], 2 * num_slots), labels.new_empty(len(STATS)), live, ref_live


def _counter_word(value: Tensor | int, device: torch.device) -> Tensor:
    """A seed or step as 0-d int64 tensor; Python numbers wrap to 64 bits."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=torch.int64).reshape(())
    return torch.full((), (value + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


@torch.no_grad()
def sample_slots(anchors: Rows, references: Rows | None = None, *, sampling: Sampling = DEFAULT_SAMPLING) -> Slots:
    """What `sample_pairs` draws, as it comes from the operator.

    Raises:
        ValueError: wrong shapes, types or devices.
    """
    own, others = anchors_and_references(anchors, references)
    check_dtypes(z=own.z, references=None if references is None else others.z)
    most, device, width = sampling.max_positives, own.z.device, own.z.shape[1]
    if most is None:
        most = _most_positives(_prepare(own, None if references is None else others))
    slots, counts, live, ref_live = _sample_pairs(
        *own, *((None,) * 4 if references is None else others),
        sampling.cutoff, sampling.nonzero_loss_cutoff, sampling.mode,
        float(width if sampling.effective_dim is None else sampling.effective_dim), min(most, others.z.shape[0]),
        _counter_word(sampling.seed, device), _counter_word(sampling.step, device),
    )  # fmt: skip
    return Slots(slots, dict(zip(STATS, counts.unbind(), strict=True)), live, ref_live)


def sample_pairs(anchors: Rows, references: Rows | None = None, *, sampling: Sampling = DEFAULT_SAMPLING) -> Pairs:
    """`reference_sampling.sample_pairs` in Triton kernels: same arguments, same pairs, no (B, G) tensor.

    z is float32, bfloat16 or float16. A row with a value of 255 or more is in no pair and counts as not finite. A draw differs
    from the reference's where two keys are closer than the rounding of distances, about 1e-4. Without `max_positives` they are
    counted: one wait.

    Raises:
        ValueError: wrong shapes, types or devices.
    """
    slots = sample_slots(anchors, references, sampling=sampling)
    num_slots, device = slots.others.shape[1] // 2, slots.others.device
    anchor = torch.arange(slots.others.shape[0], device=device)[:, None].expand_as(slots.others)
    positive = (torch.arange(2 * num_slots, device=device) < num_slots).expand_as(slots.others)
    return Pairs(anchor.reshape(-1), slots.others.reshape(-1), positive.reshape(-1), slots.stats)


def _most_positives(rows: Prepared) -> int:
    """The largest number of positives of any anchor, read from the device."""
    order = rows.anchors.order
    counts = find_positives(rows, order.new_empty(order.shape[0], 0))[:, NUM_POSITIVES.value]
    return int(counts.max()) if counts.numel() else 0
