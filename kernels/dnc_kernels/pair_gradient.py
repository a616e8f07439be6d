"""Triton kernels of the margin loss's backward: every row gathers the gradient of the pairs it is in.

    dz_r = Σ_e g_e c_e (z_r - z_partner)      over the pairs e that row r is in, as anchor or as reference

with c_e = slope / distance from the forward and g_e the gradient of its learner's sum. The own pairs of a row are
contiguous in a padded list, and grouped by `anchor` in a flat one. Its incoming pairs are grouped by `other`. A row adds
them in that order, without atomics, so every run gives the same bits. `masked_gradient.py` does the same for masked embeddings.

Shapes: B anchors, G references, D width, n pairs, K learners or masks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dnc_kernels.grouping import group
from dnc_kernels.pair_loss import PairList, used_columns
from dnc_kernels.projection import padded, warps

GATHERED = 512  # elements of partners' rows that a warp holds at once; with twice as many some variants spill


class Incidence(NamedTuple):
    """Pairs by row: those of row r are order[starts[r]:starts[r + 1]]."""

    order: Tensor
    starts: Tensor


@triton.jit
def pull(total, z_row, partners, live, partner, coefficient, upstream, width, LIVE: tl.constexpr, WIDTH: tl.constexpr):
    """total + Σ g c (z_row - z_partner) over a few pairs at once, so that the rows of the partners load together."""
    columns = tl.arange(0, WIDTH)
    used = (coefficient != 0)[:, None]  # a pair that is not, reads nothing and adds 0 whatever the row holds
    partner = partner.to(tl.int64)[:, None]
    inside = used & used_columns(live, partner, columns[None, :], width, LIVE)
    z_partner = tl.load(partners + partner * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    return total + tl.sum(tl.where(used, (coefficient * upstream)[:, None] * (z_row[None, :] - z_partner), 0.0), 0)


@triton.jit
def upstream_of(gradient, gradient_stride, num_learners, learner, anchor, HAS_LEARNER: tl.constexpr):
    """g: gradient of the sum that the pairs of an anchor belong to, 0 where they belong to none."""
    if HAS_LEARNER:
        group = tl.load(learner + anchor).to(tl.int32)
        return tl.load(gradient + group * gradient_stride, mask=(group >= 0) & (group < num_learners), other=0.0)
    else:
        return tl.load(gradient)


@triton.jit
def own_pairs(
    total,
    z_row,
    row,
    ref_z,
    ref_live,
    other,
    coefficient,
    gradient,
    gradient_stride,
    num_learners,
    learner,
    order,
    starts,
    slots,
    width,
    PADDED: tl.constexpr,
    LIVE: tl.constexpr,
    HAS_LEARNER: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """total plus the pairs that the row is the anchor of, and the gradient -g Σ slope of its boundary."""
    upstream = upstream_of(gradient, gradient_stride, num_learners, learner, row, HAS_LEARNER)
    first = row * slots if PADDED else tl.load(starts + row)
    end = first + slots if PADDED else tl.load(starts + row + 1)
    slopes = tl.zeros([PAIRS], tl.int32)
    for start in range(first, end, PAIRS):
        listed = start + tl.arange(0, PAIRS)
        inside = listed < end
        pair = listed if PADDED else tl.load(order + listed, mask=inside, other=0).to(tl.int32)
        value = tl.load(coefficient + pair, mask=inside, other=0.0)
        slopes += (value > 0).to(tl.int32) - (value < 0).to(tl.int32)
        partner = tl.load(other + pair, mask=value != 0, other=0)
        total = pull(total, z_row, ref_z, ref_live, partner, value, upstream, width, LIVE, WIDTH)
    return total, -upstream * tl.sum(slopes, 0)


@triton.jit
def incoming_pairs(
    total,
    z_row,
    row,
    z,
    live,
    anchor,
    coefficient,
    gradient,
    gradient_stride,
    num_learners,
    learner,
    order,
    starts,
    slots,
    width,
    PADDED: tl.constexpr,
    LIVE: tl.constexpr,
    HAS_LEARNER: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """total plus the pairs that the row is the reference of."""
    first, end = tl.load(starts + row), tl.load(starts + row + 1)
    for start in range(first, end, PAIRS):
        listed = start + tl.arange(0, PAIRS)
        inside = listed < end
        pair = tl.load(order + listed, mask=inside, other=0).to(tl.int32)
        partner = pair // slots if PADDED else tl.load(anchor + pair, mask=inside, other=0)
        value = tl.load(coefficient + pair, mask=inside, other=0.0)
        upstream = upstream_of(gradient, gradient_stride, num_learners, learner, partner, HAS_LEARNER)
        total = pull(total, z_row, z, live, partner, value, upstream, width, LIVE, WIDTH)
    return total


@triton.jit(do_not_specialize=["gradient_stride", "num_learners", "slots"])
def pair_gradient_kernel(
    z,  # (B, D)
    ref_z,  # (G, D)
    live,  # (B, 2) int32, read if LIVE
    ref_live,  # (G, 2) int32, read if LIVE
    anchor,  # (n,) int64, not read if PADDED
    other,  # (n,) int64
    coefficient,  # (n,) float32
    gradient,  # (K,) float32, of the learners' sums
    learner,  # (B,) int64
    own_order,  # (n,) int64, not read if PADDED
    own_starts,  # (B + 1,) int64, not read if PADDED
    incoming_order,  # (n,) int64
    incoming_starts,  # (G + 1,) int64
    row_gradient,  # (B or G, D)
    boundary_gradient,  # (B,) float32
    gradient_stride,
    num_learners,
    slots,
    width,
    OWN: tl.constexpr,
    INCOMING: tl.constexpr,
    PADDED: tl.constexpr,
    LIVE: tl.constexpr,
    HAS_LEARNER: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = used_columns(live if OWN else ref_live, row, columns, width, LIVE)
    z_row = tl.load((z if OWN else ref_z) + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    if OWN:
        total, of_boundary = own_pairs(
            total, z_row, row, ref_z, ref_live, other, coefficient, gradient, gradient_stride, num_learners, learner,
            own_order, own_starts, slots, width, PADDED, LIVE, HAS_LEARNER, PAIRS, WIDTH,
        )  # fmt: skip
        tl.store(boundary_gradient + row, of_boundary)
    if INCOMING:
        total = incoming_pairs(
            total, z_row, row, z, live, anchor, coefficient, gradient, gradient_stride, num_learners, learner,
            incoming_order, incoming_starts, slots, width, PADDED, LIVE, HAS_LEARNER, PAIRS, WIDTH,
        )  # fmt: skip
    tl.store(row_gradient + row * width + columns, total.to(row_gradient.dtype.element_ty), mask=columns < width)


def pairs_at_once(width: int) -> int:
    """Pairs whose partners a program holds at once."""
    return max(1, min(16, GATHERED * warps(width) // padded(width)))


def pair_gradient(
    gradient: Tensor,
    coefficient: Tensor,
    z: Tensor,
    ref_z: Tensor | None,
    learner: Tensor | None,
    pairs: PairList,
    *,
    references: bool = True,
    at_once: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z and ref_z (empty without `references` or without ref_z), and of every anchor's boundary (B,) float32.

    All tensors contiguous but `gradient` (K,). A program holds `at_once` pairs.
    """
    other, anchor, _, live, ref_live = pairs
    num_anchors, width = z.shape
    padded_list = anchor is None
    flat = other.view(-1)
    own = Incidence(flat, flat) if anchor is None else Incidence(*group(anchor, num_anchors))
    z_gradient, boundary_gradient = torch.empty_like(z), torch.empty(num_anchors, dtype=torch.float32, device=z.device)
    common = dict(
        PADDED=padded_list,
        LIVE=live is not None,
        HAS_LEARNER=learner is not None,
        PAIRS=at_once or pairs_at_once(width),
        WIDTH=padded(width),
        num_warps=warps(width),
    )

    def launch(rows: Tensor, incoming: Incidence, row_gradient: Tensor, **lists: bool) -> None:
        pair_gradient_kernel[(rows.shape[0],)](
            z,
            z if ref_z is None else ref_z,
            flat if live is None else live,
            flat if ref_live is None else ref_live,
            flat if anchor is None else anchor,
            flat,
            coefficient,
            gradient,
            flat if learner is None else learner,
            *own,
            *incoming,
            row_gradient,
            boundary_gradient,
            gradient.stride(0),
            gradient.shape[0],
            other.shape[-1] if padded_list else 1,
            width,
            **lists,
            **common,
        )

    if ref_z is None:
        launch(z, Incidence(*group(flat, num_anchors)), z_gradient, OWN=True, INCOMING=True)
        return z_gradient, z.new_empty(0, width), boundary_gradient
    launch(z, own, z_gradient, OWN=True, INCOMING=False)
    ref_gradient = torch.empty_like(ref_z) if references else ref_z.new_empty(0, width)
    if references:
        launch(ref_z, Incidence(*group(flat, ref_z.shape[0])), ref_gradient, OWN=False, INCOMING=True)
    return z_gradient, ref_gradient, boundary_gradient
