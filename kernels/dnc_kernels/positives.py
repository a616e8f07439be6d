"""Positives of every anchor, and where its learner and its class lie among the references in canonical order."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dnc_kernels.ordering import Order
from dnc_kernels.rows import USABLE, RowFacts

# Columns of a window, the record of 64 bytes with all that sampling needs of an anchor: its learner's segment [start, end)
# and its class's run [start, end) inside it, as places among the references in canonical order ("another class" is the
# segment without the run); how many positives it has; its live columns [start, end); its state (rows.py), or NO_LEARNER;
# its row in the batch; its row id in two halves; the bits of its squared norm; the bits of its largest log2 weight.
SEGMENT_START, SEGMENT_END, RUN_START, RUN_END, NUM_POSITIVES, LIVE_START, LIVE_END, STATE = (tl.constexpr(i) for i in range(8))
ROW, ID_LOW, ID_HIGH, NORM, LARGEST = (tl.constexpr(i) for i in range(8, 13))
WINDOW = tl.constexpr(16)
NO_SEGMENT = tl.constexpr(2147483647)  # segment start of an anchor that is in no pair
NO_LEARNER = tl.constexpr(3)
TILE_ANCHORS, TILE_RUN = 32, 16


class Prepared(NamedTuple):
    """What sampling needs of the anchors and the references; without references both are the same."""

    anchors: Order
    anchor_facts: RowFacts
    references: Order
    facts: RowFacts


@triton.jit
def _first_place(learners, labels, learner, label, n, ROWS: tl.constexpr, WITH_LABEL: tl.constexpr, AFTER: tl.constexpr):
    """First place whose (learner, label) is not before the given one, or with AFTER behind it. Without labels: by learner alone."""
    low, high = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32) + n
    while tl.max(high - low, 0) > 0:
        middle = (low + high) // 2
        open_ = low < high
        other_learner = tl.load(learners + middle, mask=open_, other=0)
        before = other_learner < learner
        equal = other_learner == learner
        if WITH_LABEL:
            other_label = tl.load(labels + middle, mask=open_, other=0)
            before = before | (equal & (other_label < label))
            equal = equal & (other_label == label)
        if AFTER:
            before = before | equal
        low = tl.where(open_ & before, middle + 1, low)
        high = tl.where(open_ & ~before, middle, high)
    return low


@triton.jit(do_not_specialize=["num_anchors", "num_references", "num_slots"])
def _positives_kernel(
    anchor_order, anchor_labels, anchor_learner, anchor_ids, anchor_norm, anchor_state, live,
    order, labels, learners, row_ids, norm_squared, windows, others,
    num_anchors, num_references, num_slots,
    ANCHORS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    inside = place < num_anchors
    learner = tl.load(anchor_learner + place, mask=inside, other=-1)
    label = tl.load(anchor_labels + place, mask=inside, other=0)
    row_id = tl.load(anchor_ids + place, mask=inside, other=0)
    state = tl.where(learner >= 0, tl.load(anchor_state + place, mask=inside, other=USABLE), NO_LEARNER)
    row = tl.load(anchor_order + place, mask=inside, other=0)
    in_pairs = inside & (state == USABLE)

    low = _first_place(learners, labels, learner, label, num_references, ANCHORS, False, False)
    high = _first_place(learners, labels, learner, label, num_references, ANCHORS, False, True)
    run_low = _first_place(learners, labels, learner, label, num_references, ANCHORS, True, False)
    run_high = tl.where(in_pairs, _first_place(learners, labels, learner, label, num_references, ANCHORS, True, True), run_low)

    count = tl.zeros((ANCHORS,), tl.int32)
    for start in range(0, tl.max(run_high - run_low, 0), RUN):
        candidate = (run_low + start)[:, None] + tl.arange(0, RUN)[None, :]
        mask = candidate < run_high[:, None]
        usable = tl.load(norm_squared + candidate, mask=mask, other=float("inf")) < float("inf")
        positive = usable & (tl.load(row_ids + candidate, mask=mask, other=0) != row_id[:, None])
        slot = count[:, None] + tl.cumsum(positive.to(tl.int32), 1) - 1
        wanted = positive & (slot < num_slots)
        target = others + (row * (2 * num_slots))[:, None] + slot
        tl.store(target, tl.load(order + candidate, mask=wanted, other=0), mask=wanted)
        count += tl.sum(positive.to(tl.int32), 1)

    window = windows + place * WINDOW
    tl.store(window + SEGMENT_START, tl.where(in_pairs & (low < high), low, NO_SEGMENT), mask=inside)
    tl.store(window + SEGMENT_END, high, mask=inside)
    tl.store(window + RUN_START, run_low, mask=inside)
    tl.store(window + RUN_END, run_high, mask=inside)
    tl.store(window + NUM_POSITIVES, count, mask=inside)
    tl.store(window + LIVE_START, tl.load(live + 2 * row, mask=inside, other=0), mask=inside)
    tl.store(window + LIVE_END, tl.load(live + 2 * row + 1, mask=inside, other=0), mask=inside)
    tl.store(window + STATE, state, mask=inside)
    tl.store(window + ROW, row.to(tl.int32), mask=inside)
    tl.store(window + ID_LOW, row_id.to(tl.int32), mask=inside)
    tl.store(window + ID_HIGH, (row_id >> 32).to(tl.int32), mask=inside)
    norm = tl.load(anchor_norm + place, mask=inside, other=0.0)
    tl.store(window + NORM, norm.to(tl.int32, bitcast=True), mask=inside)


def find_positives(rows: Prepared, others: Tensor) -> Tensor:
    """Write the positives of every anchor into others[:, :P], in canonical order.

    Args:
        others: (B, 2P) int64, filled with -1; P = 0 only counts.

    Returns:
        Windows of the anchors in canonical order, (B, 16) int32.
    """
    num_anchors, num_references = rows.anchors.order.shape[0], rows.references.order.shape[0]
    windows = torch.empty(num_anchors, WINDOW.value, dtype=torch.int32, device=others.device)
    if num_anchors:
        _positives_kernel[(triton.cdiv(num_anchors, TILE_ANCHORS),)](
            *rows.anchors, *rows.anchor_facts[1:], *rows.references, rows.facts.norm_squared, windows, others,
            num_anchors, num_references, others.shape[1] // 2, ANCHORS=TILE_ANCHORS, RUN=TILE_RUN, num_warps=4,
        )  # fmt: skip
    return windows
