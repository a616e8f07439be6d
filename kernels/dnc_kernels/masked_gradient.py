"""Triton kernel of the margin loss's backward for masked embeddings: pairs and projection in one. dz is never written.

Each program visits the rows of a chunk (`projection.py`). It gathers dz of a row as `pair_gradient.py` does. From dz it computes
the gradient of the row's embedding, and the row's part of the gradient of its mask.

Shapes: B rows, D width, n = B · slots pairs, K masks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dnc_kernels.grouping import group
from dnc_kernels.pair_gradient import incoming_pairs, own_pairs, pairs_at_once
from dnc_kernels.pair_loss import PairList, used_columns
from dnc_kernels.projection import MaskChunks, Projected, masked_row, padded, row_gradient, rows_of_chunk, warps


@triton.jit(do_not_specialize=["gradient_stride", "num_learners", "slots", "num_rows", "num_masks", "rows_per_chunk"])
def masked_pair_gradient_kernel(
    z,  # (B, D) float32
    inverse_norm,  # (B,) float32
    embeddings,  # (B, D)
    masks,  # (K, D)
    live,  # (B, 2) int32, read if LIVE
    other,  # (n,) int64
    coefficient,  # (n,) float32
    gradient,  # (K,) float32, of the learners' sums
    learner,  # (B,) int64
    incoming_order,  # (n,) int64
    incoming_starts,  # (B + 1,) int64
    order,  # (B,) int64, rows in learner order
    starts,  # (K + 1,) int64
    embedding_gradient,  # (B, D)
    boundary_gradient,  # (B,) float32
    partials,  # (chunks, D) float32
    gradient_stride,
    num_learners,
    slots,
    num_rows,
    num_masks,
    rows_per_chunk,
    width,
    LIVE: tl.constexpr,
    HAS_LEARNER: tl.constexpr,
    MASKS_GRADIENT: tl.constexpr,
    MASKS: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    chunk, columns = tl.program_id(0), tl.arange(0, WIDTH)
    inside = columns < width
    if MASKS_GRADIENT:
        first, end = rows_of_chunk(starts, chunk, num_rows, num_masks, rows_per_chunk, MASKS)
    else:
        first = chunk * rows_per_chunk
        end = tl.minimum(first + rows_per_chunk, num_rows)
    mask_total = tl.zeros([WIDTH], tl.float32)
    for i in range(first, end):
        row = tl.cast(tl.load(order + i) if MASKS_GRADIENT else i, tl.int64)
        place = row * width + columns
        z_row = tl.load(z + place, mask=used_columns(live, row, columns, width, LIVE), other=0.0)
        dz, of_boundary = own_pairs(
            tl.zeros([WIDTH], tl.float32), z_row, row, z, live, other, coefficient, gradient, gradient_stride, num_learners, learner,
            other, other, slots, width, True, LIVE, HAS_LEARNER, PAIRS, WIDTH,
        )  # fmt: skip
        tl.store(boundary_gradient + row, of_boundary)
        dz = incoming_pairs(
            dz, z_row, row, z, live, other, coefficient, gradient, gradient_stride, num_learners, learner,
            incoming_order, incoming_starts, slots, width, True, LIVE, HAS_LEARNER, PAIRS, WIDTH,
        )  # fmt: skip
        embedding, mask = masked_row(embeddings, masks, num_masks, learner, row, place, columns, width, True, HAS_LEARNER)
        row_part, mask_part = row_gradient(dz, z_row, tl.load(inverse_norm + row), embedding, mask, True)
        tl.store(embedding_gradient + place, row_part.to(embedding_gradient.dtype.element_ty), mask=inside)
        mask_total += mask_part
    if MASKS_GRADIENT:
        tl.store(partials + chunk.to(tl.int64) * width + columns, mask_total, mask=inside)


def masked_pair_gradient(
    gradient: Tensor,
    coefficient: Tensor,
    rows: Projected,
    pairs: PairList,
    *,
    masks_gradient: bool = True,
    at_once: int | None = None,
    per_chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of embeddings and masks (empty without `masks_gradient`), and of every row's boundary (B,) float32.

    All tensors contiguous but `gradient` (K,). `pairs` is a padded list over the rows themselves. A program holds `at_once`
    pairs; a chunk has `per_chunk` rows.

    Raises:
        ValueError: rows without masks.
    """
    z, inverse_norm, embeddings, learner, masks = rows
    if masks is None:
        raise ValueError("masked_pair_gradient needs rows with masks")
    other, live = pairs.other, pairs.live
    num_rows, width = z.shape
    flat = other.view(-1)
    chunks = MaskChunks(learner, masks, num_rows, masks_gradient, per_chunk)
    embedding_gradient, boundary_gradient = torch.empty_like(embeddings), torch.empty_like(inverse_norm)
    masked_pair_gradient_kernel[(chunks.num_chunks,)](
        z,
        inverse_norm,
        embeddings,
        masks,
        flat if live is None else live,
        flat,
        coefficient,
        gradient,
        flat if learner is None else learner,
        *group(flat, num_rows),
        chunks.order,
        chunks.starts,
        embedding_gradient,
        boundary_gradient,
        chunks.partials,
        gradient.stride(0),
        gradient.shape[0],
        other.shape[1],
        num_rows,
        chunks.num_masks,
        chunks.size,
        width,
        LIVE=live is not None,
        HAS_LEARNER=learner is not None,
        MASKS_GRADIENT=masks_gradient,
        MASKS=chunks.block,
        PAIRS=at_once or pairs_at_once(width),
        WIDTH=padded(width),
        num_warps=warps(width),
    )
    return embedding_gradient, chunks.add(), boundary_gradient
