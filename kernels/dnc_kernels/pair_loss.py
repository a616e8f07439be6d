"""Triton kernels of the margin loss over a list of pairs (Wu et al. 2017, eq. 6): sums, counts, and what the backward needs.

Shapes: B anchors, G references, D width, n pairs, K learners, C classes. A list is flat (anchor, other, positive), or
padded: n = B · slots, pair e belongs to anchor e // slots, and the first half of its slots are positives.
Sums are taken in fixed steps: each of a fixed number of programs writes one partial row, and a second kernel adds them in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dnc_kernels.contract import Rows
from dnc_kernels.projection import padded

LAST = tl.constexpr(2147483647)
PROGRAMS = 1024  # at most; each takes every 1024th block of pairs and writes one partial row
ADDED = 4096  # elements of partial rows that are added at once

# What the partial rows hold behind the K columns of the learners.
DISTANCE_SUMS = ("positive_distance_sum", "negative_distance_sum")
COUNTS = ("positive_pairs", "negative_pairs", "active_positive_pairs", "active_negative_pairs", "labels_beyond_beta")


class Tile(NamedTuple):
    """Pairs and columns that a program holds at once."""

    pairs: int
    columns: int
    warps: int


class PairList(NamedTuple):
    """Pairs as the kernels read them, in contiguous tensors: a flat list, or without `anchor` and `positive` a padded one.

    `live` and `ref_live`, both or neither: the columns that rows use (`rows.RowFacts`); others are not read.
    """

    other: Tensor  # (n,) or (B, slots) int64, -1 = empty
    anchor: Tensor | None = None  # (n,) int64
    positive: Tensor | None = None  # (n,) bool
    live: Tensor | None = None  # (B, 2) int32
    ref_live: Tensor | None = None  # (G, 2) int32


class PairLoss(NamedTuple):
    """Sums and counts, and what the backward needs of every pair."""

    learner_loss_sum: Tensor  # (K,) float32
    distance_sums: Tensor  # (2,) float32, DISTANCE_SUMS
    counts: Tensor  # (K + 6,) int64: active pairs of each learner, COUNTS, all active pairs
    coefficient: Tensor  # (n,) float32: slope / distance; the slope is 1 active positive, -1 active negative, 0 otherwise


def empty_pair_loss(other: Tensor, num_learners: int) -> PairLoss:
    """Where the kernels write to."""
    num_pairs, device = other.numel(), other.device
    return PairLoss(
        torch.empty(num_learners, dtype=torch.float32, device=device),
        torch.empty(len(DISTANCE_SUMS), dtype=torch.float32, device=device),
        torch.empty(num_learners + len(COUNTS) + 1, dtype=torch.int64, device=device),
        torch.empty(num_pairs, dtype=torch.float32, device=device),
    )


def default_tile(num_pairs: int, width: int) -> Tile:
    """Few pairs: many programs, each with one short step. Many pairs: narrow column blocks, so that a program holds more pairs."""
    columns = min(512, padded(width))
    return Tile(min(16, 2048 // columns), columns, 4) if num_pairs < 16384 else Tile(16, min(64, columns), 4)


@triton.jit
def used_columns(live, row, columns, width, LIVE: tl.constexpr):
    """Which columns of a row are read: its live ones (rows.py). The others hold zeros, and `other=0.0` gives zeros.

    The range is rounded to 16 columns, so that a thread can load several at once.
    """
    inside = columns < width
    if LIVE:
        first = tl.load(live + 2 * row) // 16 * 16
        end = (tl.load(live + 2 * row + 1) + 15) // 16 * 16
        inside = inside & (columns >= first) & (columns < end)
    return inside


@triton.jit(do_not_specialize=["num_pairs", "num_anchors", "slots", "num_classes", "num_learners", "margin"])
def pair_loss_kernel(
    z,  # (B, D)
    ref_z,  # (G, D)
    anchor,  # (n,) int64, not read if PADDED
    other,  # (n,) int64, -1 = empty
    positive,  # (n,) int8, not read if PADDED
    live,  # (B, 2) int32, read if LIVE
    ref_live,  # (G, 2) int32, read if LIVE
    labels,  # (B,) int64, read if PER_CLASS
    learner,  # (B,) int64, read if HAS_LEARNER
    beta,  # () or (C,)
    coefficient,  # (n,) float32
    sums,  # (programs, K + 2) float32
    counts,  # (programs, K + 5) int32
    num_pairs,
    num_anchors,
    slots,
    num_classes,
    num_learners,
    width,
    margin,
    PADDED: tl.constexpr,
    LIVE: tl.constexpr,
    HAS_LEARNER: tl.constexpr,
    PER_CLASS: tl.constexpr,
    LEARNERS: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program, lane, k = tl.program_id(0), tl.arange(0, PAIRS), tl.arange(0, LEARNERS)
    learner_sum, learner_active = tl.zeros([LEARNERS], tl.float32), tl.zeros([LEARNERS], tl.int32)
    known_distance, unknown_distance = tl.zeros([PAIRS], tl.float32), tl.zeros([PAIRS], tl.float32)
    known_pairs, unknown_pairs = tl.zeros([PAIRS], tl.int32), tl.zeros([PAIRS], tl.int32)
    known_active, unknown_active = tl.zeros([PAIRS], tl.int32), tl.zeros([PAIRS], tl.int32)
    for block in range(program, tl.cdiv(num_pairs, PAIRS), tl.num_programs(0)):
        pair = block * PAIRS + lane
        reference = tl.load(other + pair, mask=pair < num_pairs, other=-1)
        if PADDED:
            row = (pair // slots).to(tl.int64)
            known = pair % slots < slots // 2
        else:
            row = tl.load(anchor + pair, mask=reference >= 0, other=0)
            known = tl.load(positive + pair, mask=reference >= 0, other=0) != 0
        used = reference >= 0
        group = tl.zeros([PAIRS], tl.int64)
        if HAS_LEARNER:
            group = tl.load(learner + row, mask=used, other=-1)
            used = used & (group >= 0)

        # By direct difference: |a|² + |b|² - 2ab would lose small distances to cancellation.
        squares = tl.zeros([PAIRS, COLUMNS], tl.float32)
        partner = tl.maximum(reference, 0)
        first, end = 0, width
        if LIVE:
            starts = tl.minimum(tl.load(live + 2 * row, mask=used, other=LAST), tl.load(ref_live + 2 * partner, mask=used, other=LAST))
            ends = tl.maximum(tl.load(live + 2 * row + 1, mask=used, other=0), tl.load(ref_live + 2 * partner + 1, mask=used, other=0))
            first, end = tl.minimum(tl.min(starts, 0), width), tl.max(ends, 0)
        for block_of_columns in range(first // COLUMNS, tl.cdiv(end, COLUMNS)):
            columns = block_of_columns * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            own_columns = used[:, None] & used_columns(live, row[:, None], columns, width, LIVE)
            a = tl.load(z + row[:, None] * width + columns, mask=own_columns, other=0.0).to(tl.float32)
            ref_columns = used[:, None] & used_columns(ref_live, partner[:, None], columns, width, LIVE)
            b = tl.load(ref_z + partner[:, None] * width + columns, mask=ref_columns, other=0.0).to(tl.float32)
            squares += (a - b) * (a - b)
        distance = tl.sqrt(tl.sum(squares, 1))

        if PER_CLASS:
            label = tl.load(labels + row, mask=used, other=0)
            boundary = tl.load(beta + label, mask=used & (label >= 0) & (label < num_classes), other=float("nan")).to(tl.float32)
        else:
            boundary = tl.load(beta).to(tl.float32)
        sign = tl.where(known, 1.0, -1.0)
        term = sign * (distance - boundary) + margin
        sloped = used & ~(term <= 0)  # a NaN is passed on, but is no active pair
        active = used & (term > 0)
        # At distance 0 any finite coefficient will do: its factor in the gradient, the difference, is 0.
        scaled = sign / tl.where(distance == 0, 1.0, distance)
        tl.store(coefficient + pair, tl.where(sloped & (group < num_learners), scaled, 0.0), mask=pair < num_pairs)

        member = (group[:, None] == k[None, :]) & used[:, None]
        learner_sum += tl.sum(tl.where(member & sloped[:, None], term[:, None], 0.0), 0)
        learner_active += tl.sum((member & active[:, None]).to(tl.int32), 0)
        known_distance += tl.where(used & known, distance, 0.0)
        unknown_distance += tl.where(used & ~known, distance, 0.0)
        known_pairs += (used & known).to(tl.int32)
        unknown_pairs += (used & ~known).to(tl.int32)
        known_active += (active & known).to(tl.int32)
        unknown_active += (active & ~known).to(tl.int32)

    beyond = tl.zeros([PAIRS], tl.int32)
    if PER_CLASS:
        for block in range(program, tl.cdiv(num_anchors, PAIRS), tl.num_programs(0)):
            row = block * PAIRS + lane
            label = tl.load(labels + row, mask=row < num_anchors, other=0)
            beta_less = (row < num_anchors) & ((label < 0) | (label >= num_classes))
            if HAS_LEARNER:
                beta_less = beta_less & (tl.load(learner + row, mask=row < num_anchors, other=-1) >= 0)
            beyond += beta_less.to(tl.int32)

    sums += program * (num_learners + 2)
    tl.store(sums + k, learner_sum, mask=k < num_learners)
    tl.store(sums + num_learners, tl.sum(known_distance, 0))
    tl.store(sums + num_learners + 1, tl.sum(unknown_distance, 0))
    counts += program * (num_learners + 5)
    tl.store(counts + k, learner_active, mask=k < num_learners)
    tl.store(counts + num_learners, tl.sum(known_pairs, 0))
    tl.store(counts + num_learners + 1, tl.sum(unknown_pairs, 0))
    tl.store(counts + num_learners + 2, tl.sum(known_active, 0))
    tl.store(counts + num_learners + 3, tl.sum(unknown_active, 0))
    tl.store(counts + num_learners + 4, tl.sum(beyond, 0))


@triton.jit(do_not_specialize=["num_partials", "num_learners"])
def totals_kernel(
    sums,  # (programs, K + 2) float32
    counts,  # (programs, K + 5) int32
    learner_loss_sum,  # (K,) float32
    distance_sums,  # (2,) float32
    total_counts,  # (K + 6,) int64
    num_partials,
    num_learners,
    ADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    added_sums, added_counts = tl.zeros([COLUMNS], tl.float64), tl.zeros([COLUMNS], tl.int64)
    for block in range(0, tl.cdiv(num_partials, ADDED)):
        partial = block * ADDED + tl.arange(0, ADDED)[:, None]
        inside = partial < num_partials
        of_sums = inside & (column < num_learners + 2)[None, :]
        added_sums += tl.sum(tl.load(sums + partial * (num_learners + 2) + column[None, :], mask=of_sums, other=0.0).to(tl.float64), 0)
        of_counts = inside & (column < num_learners + 5)[None, :]
        added_counts += tl.sum(tl.load(counts + partial * (num_learners + 5) + column[None, :], mask=of_counts, other=0).to(tl.int64), 0)
    tl.store(learner_loss_sum + column, added_sums.to(tl.float32), mask=column < num_learners)
    behind = column - num_learners
    tl.store(distance_sums + behind, added_sums.to(tl.float32), mask=(behind >= 0) & (behind < 2))
    tl.store(total_counts + column, added_counts, mask=behind < 5)
    tl.store(total_counts + num_learners + 5, tl.sum(tl.where(behind < 0, added_counts, 0), 0))


def pair_loss(
    anchors: Rows, ref_z: Tensor, pairs: PairList, *, beta: Tensor, margin: float, num_learners: int, tile: Tile | None = None
) -> PairLoss:
    """Launch both kernels on contiguous tensors."""
    z, labels, learner, _ = anchors
    other, anchor, positive, live, ref_live = pairs
    num_pairs, num_anchors, width = other.numel(), z.shape[0], z.shape[1]
    tile = tile or default_tile(num_pairs, width)
    device, per_class = z.device, beta.ndim == 1
    programs = min(PROGRAMS, max(1, triton.cdiv(max(num_pairs, num_anchors * per_class), tile.pairs)))
    out = empty_pair_loss(other, num_learners)
    sums = torch.empty(programs, num_learners + len(DISTANCE_SUMS), dtype=torch.float32, device=device)
    counts = torch.empty(programs, num_learners + len(COUNTS), dtype=torch.int32, device=device)
    pair_loss_kernel[(programs,)](
        z,
        ref_z,
        other if anchor is None else anchor,
        other,
        other if positive is None else positive.view(torch.int8),
        other if live is None else live,
        other if ref_live is None else ref_live,
        labels,
        labels if learner is None else learner,
        beta,
        out.coefficient,
        sums,
        counts,
        num_pairs,
        num_anchors,
        other.shape[-1] if anchor is None else 1,
        beta.numel(),
        num_learners,
        width,
        margin,
        PADDED=anchor is None,
        LIVE=live is not None,
        HAS_LEARNER=learner is not None,
        PER_CLASS=per_class,
        LEARNERS=triton.next_power_of_2(num_learners),
        PAIRS=tile.pairs,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
    )
    columns = padded(num_learners + len(COUNTS))
    totals_kernel[(1,)](
        sums, counts, out.learner_loss_sum, out.distance_sums, out.counts, programs, num_learners, max(1, ADDED // columns), columns
    )
    return out
