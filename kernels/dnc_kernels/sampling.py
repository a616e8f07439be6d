"""`sample_pairs` in Triton kernels: order the rows, look at them once, list the positives, draw the negatives.

The steps stand in ordering.py, rows.py, positives.py and race.py; here they become one operator with the signature of
`reference_sampling.sample_pairs`, which is the specification.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dnc_kernels.contract import Pairs, anchors_and_references, check_sampling
from dnc_kernels.ordering import Order, canonical_order
from dnc_kernels.positives import NUM_POSITIVES, find_positives
from dnc_kernels.race import draw_negatives
from dnc_kernels.rows import RowFacts, num_parts, row_facts
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


class Prepared(NamedTuple):
    """What sampling needs of the anchors and the references; without references both are the same."""

    anchors: Order
    anchor_facts: RowFacts
    references: Order
    facts: RowFacts


def _prepare(
    z: Tensor,
    labels: Tensor,
    learner: Tensor,
    row_ids: Tensor,
    ref_z: Tensor | None,
    ref_labels: Tensor | None,
    ref_learner: Tensor | None,
    ref_row_ids: Tensor | None,
) -> Prepared:
    anchors = canonical_order(labels, learner, row_ids)
    parts = max(num_parts(value) for value in (z, ref_z) if value is not None)
    anchor_facts = row_facts(z, anchors.order, parts)
    if ref_z is None or ref_labels is None or ref_learner is None or ref_row_ids is None:
        return Prepared(anchors, anchor_facts, anchors, anchor_facts)
    references = canonical_order(ref_labels, ref_learner, ref_row_ids)
    return Prepared(anchors, anchor_facts, references, row_facts(ref_z, references.order, parts))


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
    seed: Tensor,
    step: Tensor,
    cutoff: float,
    nonzero_loss_cutoff: float,
    floors: bool,
    effective_dim: float,
    num_slots: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of Slots; the counts named by STATS as (7,) int64."""
    anchors, anchor_facts, references, facts = _prepare(z, labels, learner, row_ids, ref_z, ref_labels, ref_learner, ref_row_ids)
    others = torch.full((z.shape[0], 2 * num_slots), -1, dtype=torch.int64, device=z.device)
    stats = torch.zeros(len(STATS), dtype=torch.int64, device=z.device)
    windows = find_positives(anchors, anchor_facts, references, facts, others)
    draw_negatives(
        windows, anchor_facts, facts, references.order, others, stats, seed, step,
        cutoff=cutoff, nonzero_loss_cutoff=nonzero_loss_cutoff, floors=floors, effective_dim=effective_dim,
    )  # fmt: skip
    live = anchor_facts.live
    return others, stats, live, live.new_empty(0, 2) if ref_z is None else facts.live


@_sample_pairs.register_fake
def _(z: Tensor, labels: Tensor, learner: Tensor, row_ids: Tensor, ref_z: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    num_slots = others[-1]
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
def sample_slots(
    z: Tensor,
    labels: Tensor,
    *,
    learner: Tensor | None = None,
    ref_z: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ref_learner: Tensor | None = None,
    row_ids: Tensor | None = None,
    ref_row_ids: Tensor | None = None,
    cutoff: float = 0.5,
    nonzero_loss_cutoff: float = 1.4,
    mode: str = "paper",
    effective_dim: float | None = None,
    seed: Tensor | int = 0,
    step: Tensor | int = 0,
    max_positives: int | None = None,
) -> Slots:
    """What `sample_pairs` draws, as it comes from the operator.

    Raises:
        ValueError: wrong shapes, types, devices or constants.
    """
    check_sampling(cutoff, nonzero_loss_cutoff, mode, effective_dim, max_positives)
    anchors, references = anchors_and_references(z, labels, learner, row_ids, ref_z, ref_labels, ref_learner, ref_row_ids)
    check_dtypes(z=z, ref_z=ref_z)
    columns = (*anchors, *((None,) * 4 if ref_z is None else references))
    if max_positives is None:
        max_positives = _most_positives(*columns)
    others, counts, live, ref_live = _sample_pairs(
        *columns, _counter_word(seed, z.device), _counter_word(step, z.device),
        cutoff, nonzero_loss_cutoff, mode == "reference", float(z.shape[1] if effective_dim is None else effective_dim),
        min(max_positives, references.z.shape[0]),
    )  # fmt: skip
    return Slots(others, dict(zip(STATS, counts.unbind(), strict=True)), live, ref_live)


def sample_pairs(
    z: Tensor,
    labels: Tensor,
    *,
    learner: Tensor | None = None,
    ref_z: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ref_learner: Tensor | None = None,
    row_ids: Tensor | None = None,
    ref_row_ids: Tensor | None = None,
    cutoff: float = 0.5,
    nonzero_loss_cutoff: float = 1.4,
    mode: str = "paper",
    effective_dim: float | None = None,
    seed: Tensor | int = 0,
    step: Tensor | int = 0,
    max_positives: int | None = None,
) -> Pairs:
    """`reference_sampling.sample_pairs` in Triton kernels: same arguments, same pairs, no (B, G) tensor.

    z (B, D) and ref_z (G, D) are float32, bfloat16 or float16 unit rows; a row with a value of 255 or more is in no pair and
    counts as not finite. A draw differs from the reference's where two keys are closer than the rounding of distances, about
    1e-4. Without `max_positives` they are counted: one wait.

    Raises:
        ValueError: wrong shapes, types, devices or constants.
    """
    slots = sample_slots(
        z,
        labels,
        learner=learner,
        ref_z=ref_z,
        ref_labels=ref_labels,
        ref_learner=ref_learner,
        row_ids=row_ids,
        ref_row_ids=ref_row_ids,
        cutoff=cutoff,
        nonzero_loss_cutoff=nonzero_loss_cutoff,
        mode=mode,
        effective_dim=effective_dim,
        seed=seed,
        step=step,
        max_positives=max_positives,
    )
    num_slots = slots.others.shape[1] // 2
    anchor = torch.arange(z.shape[0], device=z.device)[:, None].expand_as(slots.others)
    positive = (torch.arange(2 * num_slots, device=z.device) < num_slots).expand_as(slots.others)
    return Pairs(anchor.reshape(-1), slots.others.reshape(-1), positive.reshape(-1), slots.stats)


def _most_positives(*columns: Tensor | None) -> int:
    """The largest number of positives of any anchor, read from the device."""
    prepared = _prepare(*columns)  # type: ignore[arg-type]
    only_counted = prepared.anchors.order.new_empty(prepared.anchors.order.shape[0], 0)
    counts = find_positives(*prepared, only_counted)[:, NUM_POSITIVES.value]
    return int(counts.max()) if counts.numel() else 0
