"""Triton kernels of z = normalise(relu(m_a) ⊙ e): forward, and the gradients of embeddings and masks.

Shapes: B rows, D width, K masks. The gradient of a mask is a sum over the rows of its learner. It is taken in two fixed
steps: rows in learner order are cut into chunks that never span two learners, each chunk writes one partial row, and a
second kernel adds the partial rows of a learner in order. So every run gives the same bits, without atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dnc_kernels.grouping import group

NORM_SQUARED_MIN = tl.constexpr(1e-24)  # below, a row is taken for zero
TILE = 2048  # elements that a program of the forward holds
ADDED, ADDED_COLUMNS = 128, 32  # tile of partial rows that are added up
PROGRAMS = 1024  # that share the rows of a backward: about as many as run at the same time


class Projected(NamedTuple):
    """Projected rows and what they were made of, in contiguous tensors."""

    z: Tensor  # (B, D) float32
    inverse_norm: Tensor  # (B,) float32, 1 / |h|, 0 for a row that its mask wipes out
    embeddings: Tensor  # (B, D)
    learner: Tensor | None  # (B,) int64, None: all take mask 0
    masks: Tensor | None  # (K, D)


def padded(size: int) -> int:
    """The block that holds `size` elements: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(size))


def warps(width: int) -> int:
    """Warps of a program that holds whole rows of this width."""
    return 4 if width <= 1024 else 8 if width <= 4096 else 16


def rows_per_program(num_rows: int) -> int:
    """Rows that one program of a backward visits, and that share one partial row of the masks' gradient."""
    return max(1, triton.cdiv(num_rows, PROGRAMS))


@triton.jit(do_not_specialize=["num_rows", "num_masks"])
def project_kernel(
    embeddings,  # (B, D)
    masks,  # (K, D)
    learner,  # (B,) int64
    z,  # (B, D) float32
    inverse_norm,  # (B,) float32
    num_rows,
    num_masks,
    width,
    HAS_MASKS: tl.constexpr,
    HAS_LEARNER: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = (row < num_rows)[:, None] & (columns < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + columns[None, :]
    hidden = tl.load(embeddings + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_MASKS:
        mask_row = tl.zeros([ROWS], tl.int64)
        if HAS_LEARNER:  # learner -1 takes mask 0
            mask_row = tl.maximum(tl.load(learner + row, mask=row < num_rows, other=0), 0)
        mask_place = mask_row[:, None] * width + columns[None, :]
        # A learner without mask makes its rows NaN, which `sample_pairs` counts; reading its number would wait for the device.
        mask = tl.load(masks + mask_place, mask=inside & (mask_row < num_masks)[:, None], other=float("nan")).to(tl.float32)
        hidden = tl.where(inside, hidden * rectified(mask), 0.0)
    norm_squared = tl.sum(hidden * hidden, 1)
    zero = norm_squared <= NORM_SQUARED_MIN  # false for NaN, which comes out as NaN
    inverse = tl.where(zero, 0.0, tl.rsqrt(tl.where(zero, 1.0, norm_squared)))
    tl.store(z + place, hidden * inverse[:, None], mask=inside)
    tl.store(inverse_norm + row, inverse, mask=row < num_rows)


@triton.jit
def rectified(mask):
    """relu that keeps a NaN."""
    return tl.where(mask <= 0, 0.0, mask)


@triton.jit
def chunks_of_learners(starts, num_rows, num_masks, rows_per_chunk, MASKS: tl.constexpr):
    """Of each learner: its first row in learner order, the end of its rows, its number of chunks, and its first chunk."""
    k = tl.arange(0, MASKS)
    # Rows of learner -1 stand first and take mask 0; rows beyond the last mask, an error, stand last and become NaN.
    begin = tl.load(starts + k, mask=(k > 0) & (k < num_masks), other=0).to(tl.int32)
    end = tl.load(starts + k + 1, mask=k + 1 < num_masks, other=0).to(tl.int32)
    end = tl.where(k + 1 == num_masks, num_rows, end)
    chunks = tl.where(k < num_masks, (end - begin + rows_per_chunk - 1) // rows_per_chunk, 0)
    return begin, end, chunks, tl.cumsum(chunks, 0) - chunks


@triton.jit
def rows_of_chunk(starts, chunk, num_rows, num_masks, rows_per_chunk, MASKS: tl.constexpr):
    """First and end of a chunk's rows in learner order; nothing for a chunk beyond the last."""
    begin, end, chunks, first_chunk = chunks_of_learners(starts, num_rows, num_masks, rows_per_chunk, MASKS)
    mine = (chunk >= first_chunk) & (chunk < first_chunk + chunks)
    first = tl.sum(tl.where(mine, begin + (chunk - first_chunk) * rows_per_chunk, 0), 0)
    return first, tl.minimum(first + rows_per_chunk, tl.sum(tl.where(mine, end, 0), 0))


@triton.jit
def row_gradient(dz, z_row, inverse, embedding, mask, HAS_MASKS: tl.constexpr):
    """One row: dh = (dz - z (z · dz)) / |h|, then dE = relu(m) ⊙ dh and its part e ⊙ dh ⊙ [m > 0] of dM."""
    hidden = (dz - z_row * tl.sum(z_row * dz, 0)) * inverse
    if HAS_MASKS:
        return rectified(mask) * hidden, tl.where(mask > 0, embedding * hidden, 0.0)
    else:
        return hidden, hidden


@triton.jit(do_not_specialize=["num_rows", "num_masks", "rows_per_chunk"])
def project_backward_kernel(
    dz,  # (B, D) float32
    z,  # (B, D) float32
    inverse_norm,  # (B,) float32
    embeddings,  # (B, D)
    masks,  # (K, D)
    learner,  # (B,) int64
    order,  # (B,) int64, rows in learner order
    starts,  # (K + 1,) int64
    gradient,  # (B, D)
    partials,  # (chunks, D) float32
    num_rows,
    num_masks,
    rows_per_chunk,
    width,
    HAS_MASKS: tl.constexpr,
    HAS_LEARNER: tl.constexpr,
    MASKS_GRADIENT: tl.constexpr,
    MASKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    chunk = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    if MASKS_GRADIENT:
        first, end = rows_of_chunk(starts, chunk, num_rows, num_masks, rows_per_chunk, MASKS)
    else:
        first = chunk * rows_per_chunk
        end = tl.minimum(first + rows_per_chunk, num_rows)
    total = tl.zeros([WIDTH], tl.float32)
    for i in range(first, end):
        row = tl.cast(tl.load(order + i) if MASKS_GRADIENT else i, tl.int64)
        place = row * width + columns
        embedding, mask = masked_row(embeddings, masks, num_masks, learner, row, place, columns, width, HAS_MASKS, HAS_LEARNER)
        z_row = tl.load(z + place, mask=inside, other=0.0)
        upstream = tl.load(dz + place, mask=inside, other=0.0)
        inverse = tl.load(inverse_norm + row)
        row_part, mask_part = row_gradient(upstream, z_row, inverse, embedding, mask, HAS_MASKS)
        tl.store(gradient + place, row_part.to(gradient.dtype.element_ty), mask=inside)
        total += mask_part
    if MASKS_GRADIENT:
        tl.store(partials + chunk.to(tl.int64) * width + columns, total, mask=inside)


@triton.jit
def masked_row(embeddings, masks, num_masks, learner, row, place, columns, width, HAS_MASKS: tl.constexpr, HAS_LEARNER: tl.constexpr):
    """The embedding of a row, where its mask is above 0, and the mask, float32; neither is read where there are no masks."""
    embedding = tl.zeros_like(columns).to(tl.float32)
    mask = embedding
    if HAS_MASKS:
        # Beyond the last mask any will do: z is NaN there, and so will be the gradient.
        mask_row = tl.minimum(tl.maximum(tl.load(learner + row), 0), num_masks - 1) if HAS_LEARNER else 0
        mask = tl.load(masks + mask_row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
        embedding = tl.load(embeddings + place, mask=mask > 0, other=0.0).to(tl.float32)
    return embedding, mask


@triton.jit(do_not_specialize=["num_rows", "num_masks", "rows_per_chunk"])
def add_chunks_kernel(
    partials,  # (chunks, D) float32
    starts,  # (K + 1,) int64
    gradient,  # (K, D)
    num_rows,
    num_masks,
    rows_per_chunk,
    width,
    MASKS: tl.constexpr,
    ADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    mine = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    _, _, chunks, first_chunk = chunks_of_learners(starts, num_rows, num_masks, rows_per_chunk, MASKS)
    k = tl.arange(0, MASKS)
    first = tl.sum(tl.where(k == mine, first_chunk, 0), 0)
    end = first + tl.sum(tl.where(k == mine, chunks, 0), 0)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(first, end, ADDED):
        chunk = start + tl.arange(0, ADDED)
        inside = (chunk < end)[:, None] & (columns < width)[None, :]
        total += tl.sum(tl.load(partials + chunk.to(tl.int64)[:, None] * width + columns[None, :], mask=inside, other=0.0), 0)
    tl.store(gradient + mine.to(tl.int64) * width + columns, total.to(gradient.dtype.element_ty), mask=columns < width)


class MaskChunks:
    """Rows in learner order, their chunks, and a partial row of the masks' gradient for each chunk; empty where it is not wanted."""

    def __init__(self, learner: Tensor | None, masks: Tensor, num_rows: int, wanted: bool, size: int | None = None) -> None:
        (self.num_masks, self.width), self.size = masks.shape, size or rows_per_program(num_rows)
        self.num_rows, self.num_chunks = num_rows, triton.cdiv(num_rows, self.size)
        self.block = padded(self.num_masks)
        self.gradient = masks.new_empty(self.num_masks if wanted else 0, self.width)
        self.order = self.starts = self.partials = masks  # not read unless wanted
        if wanted:
            self.num_chunks += self.num_masks  # a learner's last chunk may be short
            learner = torch.zeros(num_rows, dtype=torch.int64, device=masks.device) if learner is None else learner
            self.order, self.starts = group(learner, self.num_masks)
            self.partials = torch.empty(self.num_chunks, self.width, dtype=torch.float32, device=masks.device)

    def add(self) -> Tensor:
        """The gradient of the masks (K, D) from the partial rows."""
        grid = (self.gradient.shape[0], triton.cdiv(self.width, ADDED_COLUMNS))
        add_chunks_kernel[grid](
            self.partials,
            self.starts,
            self.gradient,
            self.num_rows,
            self.num_masks,
            self.size,
            self.width,
            self.block,
            ADDED,
            ADDED_COLUMNS,
        )
        return self.gradient


def project(embeddings: Tensor, learner: Tensor | None, masks: Tensor | None) -> tuple[Tensor, Tensor]:
    """z (B, D) and 1 / |h| (B,), float32, 0 for a row that its mask wipes out; contiguous tensors."""
    num_rows, width = embeddings.shape
    z = torch.empty(embeddings.shape, dtype=torch.float32, device=embeddings.device)
    inverse_norm = z.new_empty(num_rows)
    rows = max(1, TILE // padded(width))
    project_kernel[(triton.cdiv(num_rows, rows),)](
        embeddings,
        embeddings if masks is None else masks,
        embeddings if learner is None else learner,
        z,
        inverse_norm,
        num_rows,
        0 if masks is None else masks.shape[0],
        width,
        HAS_MASKS=masks is not None,
        HAS_LEARNER=learner is not None,
        ROWS=rows,
        WIDTH=padded(width),
        num_warps=warps(width),
    )
    return z, inverse_norm


def project_backward(dz: Tensor, rows: Projected, *, masks_gradient: bool = True, per_chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of embeddings (B, D) and masks (K, D; empty without masks or `masks_gradient`); contiguous tensors."""
    z, inverse_norm, embeddings, learner, masks = rows
    num_rows, width = embeddings.shape
    masks_gradient = masks_gradient and masks is not None
    read = embeddings if masks is None else masks
    chunks = MaskChunks(learner, read, num_rows, masks_gradient, per_chunk)
    gradient = torch.empty_like(embeddings)
    project_backward_kernel[(chunks.num_chunks,)](
        dz,
        z,
        inverse_norm,
        embeddings,
        read,
        embeddings if learner is None else learner,
        chunks.order,
        chunks.starts,
        gradient,
        chunks.partials,
        num_rows,
        chunks.num_masks,
        chunks.size,
        width,
        HAS_MASKS=masks is not None,
        HAS_LEARNER=learner is not None,
        MASKS_GRADIENT=masks_gradient,
        MASKS=chunks.block,
        WIDTH=padded(width),
        num_warps=warps(width),
    )
    return gradient, chunks.add()
