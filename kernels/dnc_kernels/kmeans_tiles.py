"""What the Lloyd kernels share: products of rows with centroids, the nearest centroid so far, one-hot sums, ordered totals.

Matrix units multiply 16-bit numbers here, and products stay as exact as in float32. A centroid c is stored as two such
terms, c = first + second. float32 rows are split into terms in registers. A one-hot factor is exact.

Shapes: N rows of width D, K centroids, P partial sums; a tile holds some rows, some columns (of D) and some centroids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dnc_kernels.target import INTERPRETED

ROWS_PER_SUM = 4096  # float32 sums of so many rows at most, for matrix units round towards zero; the rest is added in float64
INTERPRETED_PROGRAMS = 4


@triton.jit(do_not_specialize=["num_centroids"])
def _split_centroids(
    centroids_ptr,  # (K, D)
    terms_ptr,  # (2 grid, terms_width)
    half_norm_ptr,  # (grid,) float32
    num_centroids,
    width,
    terms_width,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK_WIDTH)
    known = row < num_centroids
    c = tl.load(centroids_ptr + row.to(tl.int64) * width + columns, mask=known & (columns < width), other=0.0).to(tl.float32)
    first = c.to(terms_ptr.dtype.element_ty)
    second = (c - first.to(tl.float32)).to(first.dtype)
    at = 2 * row.to(tl.int64) * terms_width + columns
    tl.store(terms_ptr + at, first, mask=columns < terms_width)
    tl.store(terms_ptr + at + terms_width, second, mask=columns < terms_width)
    tl.store(half_norm_ptr + row, tl.where(known, 0.5 * tl.sum(c * c, 0), float("inf")))


def split_centroids(centroids: Tensor, dtype: torch.dtype, num: int, width: int) -> tuple[Tensor, Tensor]:
    """Centroids for rows of `dtype`, filled up to `num` and `width` so that kernels load them without a mask.

    Returns:
        terms (2 num, width): centroid k is row 2k + row 2k+1; half_norms (num,) float32 |c|²/2, infinity beyond K.
    """
    centroids = centroids.contiguous()
    if INTERPRETED:  # which cannot round to bfloat16: then the first term is all of the centroid
        dtype = torch.float32
    elif dtype == torch.float32:
        dtype = torch.bfloat16
    terms = torch.empty(2 * num, width, dtype=dtype, device=centroids.device)
    half_norms = torch.empty(num, device=centroids.device)
    block_width = triton.next_power_of_2(width)
    _split_centroids[(num,)](centroids, terms, half_norms, *centroids.shape, width, BLOCK_WIDTH=block_width, num_warps=4)
    return terms, half_norms


def row_chunks(num_rows: int, block_rows: int, device: torch.device) -> tuple[int, int]:
    """Number of chunks that fill the device evenly, and rows per chunk, a multiple of `block_rows`."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED_PROGRAMS
    chunks = processors * triton.cdiv(num_rows, processors * ROWS_PER_SUM)
    rows = triton.cdiv(triton.cdiv(num_rows, chunks), block_rows) * block_rows
    return triton.cdiv(num_rows, rows), rows


@triton.jit
def add_products(products, x, terms):
    """products (rows, 2 centroids) + x (rows, columns) · terms (columns, 2 centroids)."""
    if INTERPRETED:
        products = tl.dot(x.to(tl.float32), terms.to(tl.float32), products, input_precision="ieee")
    elif x.dtype == tl.float32:
        first = x.to(tl.bfloat16)
        second = (x - first.to(tl.float32)).to(tl.bfloat16)
        products = tl.dot(first, terms, products)
        products = tl.dot(second, terms, products)
    else:
        products = tl.dot(x, terms, products)
    return products


@triton.jit
def add_members(sums, x_t, member):
    """sums (columns, centroids) + xᵀ · member, member (rows, centroids) one-hot; three terms are all of a float32.

    The columns of x come first because Hopper's matrix instruction wants 64 or more there, and centroids may be few.
    """
    if INTERPRETED:
        sums = tl.dot(x_t.to(tl.float32), member.to(tl.float32), sums, input_precision="ieee")
    elif x_t.dtype == tl.float32:
        first = x_t.to(tl.bfloat16)
        rest = x_t - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        third = (rest - second.to(tl.float32)).to(tl.bfloat16)
        one_hot = member.to(tl.bfloat16)
        sums = tl.dot(first, one_hot, sums)
        sums = tl.dot(second, one_hot, sums)
        sums = tl.dot(third, one_hot, sums)
    else:
        sums = tl.dot(x_t, member.to(x_t.dtype), sums)
    return sums


@triton.jit
def squared_distances(norms, best):
    """(rows,) |x|² + 2 (|c|²/2 - x·c), not below 0. NaN stays NaN; without `propagate_nan` a maximum would drop it."""
    return tl.maximum(norms + 2 * best, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def squared_norms(x):
    """(rows,) float32 |x|² of a tile."""
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, 1)


@triton.jit
def improve(best, nearest, products, half_norms, candidates, parent, RESTRICTED: tl.constexpr):
    """The smaller of `best` (rows,) and |c|²/2 - x·c over a tile of candidates, and its index; the lowest index on a tie.

    A row of NaN keeps the `nearest` that it had.
    """
    score = half_norms[None, :] - tl.sum(tl.reshape(products, (products.shape[0], products.shape[1] // 2, 2)), 2)
    if RESTRICTED:
        score = tl.where(candidates[None, :] // 2 == parent[:, None], score, float("inf"))
    smallest = tl.min(score, 1)
    found = tl.min(tl.where(score == smallest[:, None], candidates[None, :], 0x7FFFFFFF), 1)
    better = smallest < best
    return tl.where(better, smallest, best), tl.where(better, found, nearest)


@triton.jit
def _add_partials(
    partial_ptr,  # (P, W) float32
    start_ptr,  # (S + 1,) int64 segment s is the partial sums start[s] to start[s + 1]
    total_ptr,  # (S, W) float64
    width,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    segment = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    first = tl.load(start_ptr + segment)
    end = tl.load(start_ptr + segment + 1)
    total = tl.zeros((BLOCK_PARTS, BLOCK_WIDTH), tl.float64)
    for block in range(0, tl.cdiv(end - first, BLOCK_PARTS)):
        parts = first + block * BLOCK_PARTS + tl.arange(0, BLOCK_PARTS)
        inside = (parts < end)[:, None] & (columns < width)[None, :]
        total += tl.load(partial_ptr + parts[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float64)
    tl.store(total_ptr + segment.to(tl.int64) * width + columns, tl.sum(total, 0), mask=columns < width)


def add_partials(partial: Tensor, starts: Tensor) -> Tensor:
    """float64 totals (S, W) of consecutive segments of partial sums (P, W), in a fixed order; starts (S + 1,) int64."""
    segments, width = starts.shape[0] - 1, partial.shape[1]
    totals = torch.empty(segments, width, dtype=torch.float64, device=partial.device)
    _add_partials[(segments, triton.cdiv(width, 128))](partial, starts, totals, width, BLOCK_PARTS=32, BLOCK_WIDTH=128, num_warps=8)
    return totals
