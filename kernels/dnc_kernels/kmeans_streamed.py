"""A Lloyd step for any number of centroids, in two kernels: nearest centroids, then the sums of their rows.

The first kernel streams x and the centroids in tiles and keeps the nearest centroid so far. The second reads x again. Up to
ONE_HOT_CENTROIDS it takes one-hot products on a grid of (row chunk, columns). Above, rows are sorted by centroid, and a program
adds up to ROWS_PER_SEGMENT rows of one centroid.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dnc_kernels.kmeans_tiles import (
    add_members,
    add_partials,
    add_products,
    improve,
    row_chunks,
    split_centroids,
    squared_distances,
    squared_norms,
)

ONE_HOT_CENTROIDS = 128
ROWS_PER_SEGMENT = 256


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def _nearest(
    x_ptr,  # (N, D)
    terms_ptr,  # (2 num_tiles BLOCK_CENTROIDS, terms_width)
    half_norm_ptr,  # (num_tiles BLOCK_CENTROIDS,) float32
    parent_ptr,  # (N,) int64, or anything unless RESTRICTED
    assignment_ptr,  # (N,) int64
    distance_ptr,  # (N,) float32
    num_rows,
    width,
    terms_width,
    num_tiles,
    RESTRICTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_CENTROIDS: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_ROWS
    rows = start + tl.arange(0, BLOCK_ROWS)
    taken = rows < num_rows
    parent = tl.zeros((BLOCK_ROWS,), tl.int32)
    if RESTRICTED:
        parent = tl.load(parent_ptr + rows, mask=taken, other=-1).to(tl.int32)
        taken = parent >= 0
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * width
    inside = (rows < num_rows)[:, None]
    terms = tl.arange(0, 2 * BLOCK_CENTROIDS)[None, :]
    best = tl.full((BLOCK_ROWS,), float("inf"), tl.float32)
    nearest = 2 * parent
    norms = tl.zeros((BLOCK_ROWS,), tl.float32)
    for tile in range(0, num_tiles):
        products = tl.zeros((BLOCK_ROWS, 2 * BLOCK_CENTROIDS), tl.float32)
        norms = tl.zeros((BLOCK_ROWS,), tl.float32)
        for block in range(0, tl.cdiv(width, BLOCK_WIDTH)):
            columns = block * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
            x = tl.load(x_rows + columns[None, :], mask=inside & (columns < width)[None, :], other=0.0)
            term = tl.load(terms_ptr + terms * terms_width + columns[:, None])
            norms += squared_norms(x)
            products = add_products(products, x, term)
        candidates = tile * BLOCK_CENTROIDS + tl.arange(0, BLOCK_CENTROIDS)
        best, nearest = improve(best, nearest, products, tl.load(half_norm_ptr + candidates), candidates, parent, RESTRICTED)
        terms_ptr += 2 * BLOCK_CENTROIDS * terms_width  # a step, as K · D may be beyond 32 bits
    tl.store(assignment_ptr + rows, tl.where(taken, nearest, -1).to(tl.int64), mask=rows < num_rows)
    tl.store(distance_ptr + rows, tl.where(taken, squared_distances(norms, best), 0.0), mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def _one_hot_sums(
    x_ptr,  # (N, D)
    assignment_ptr,  # (N,) int64
    sums_ptr,  # (P, BLOCK_CENTROIDS, D rounded up to BLOCK_WIDTH) float32
    counts_ptr,  # (P, BLOCK_CENTROIDS) int32
    num_rows,
    width,
    rows_per_program,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_CENTROIDS: tl.constexpr,
):
    # Neighbouring programs share rows, so that a row is read in one go.
    blocks = tl.cdiv(width, BLOCK_WIDTH)
    block, chunk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    columns = block * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    candidates = tl.arange(0, BLOCK_CENTROIDS)
    sums = tl.zeros((BLOCK_WIDTH, BLOCK_CENTROIDS), tl.float32)
    counts = tl.zeros((BLOCK_CENTROIDS,), tl.int32)
    first = chunk * rows_per_program
    for tile in range(0, tl.cdiv(tl.minimum(rows_per_program, num_rows - first), BLOCK_ROWS)):
        rows = first + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = rows < num_rows
        assignment = tl.load(assignment_ptr + rows, mask=inside, other=-1).to(tl.int32)
        at = rows.to(tl.int64)[None, :] * width + columns[:, None]
        x_t = tl.load(x_ptr + at, mask=inside[None, :] & (columns < width)[:, None], other=0.0)
        member = assignment[:, None] == candidates[None, :]
        sums = add_members(sums, x_t, member)
        counts += tl.sum(member.to(tl.int32), 0)
    part = (chunk.to(tl.int64) * BLOCK_CENTROIDS + candidates[None, :]) * (blocks * BLOCK_WIDTH) + columns[:, None]
    tl.store(sums_ptr + part, sums)
    if block == 0:
        tl.store(counts_ptr + chunk * BLOCK_CENTROIDS + candidates, counts)


@triton.jit
def _segment_sums(
    x_ptr,  # (N, D)
    order_ptr,  # (N,) int64 rows sorted by centroid
    first_ptr,  # (P,) int64 segment p adds the rows order[first] to order[end - 1]
    end_ptr,  # (P,) int64
    sums_ptr,  # (P, D) float32
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    segment = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    first = tl.load(first_ptr + segment)
    end = tl.load(end_ptr + segment)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    for block in range(0, tl.cdiv(end - first, BLOCK_ROWS)):
        places = first + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        rows = tl.load(order_ptr + places, mask=places < end, other=0)
        inside = (places < end)[:, None] & (columns < width)[None, :]
        sums += tl.load(x_ptr + rows[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(sums_ptr + segment.to(tl.int64) * width + columns, tl.sum(sums, 0), mask=columns < width)


def nearest_shape(dtype: torch.dtype, num_centroids: int) -> dict[str, int]:
    """Tile and launch of the assignment. float32 rows are split into terms in registers, so their tiles are half as wide."""
    wide = dtype == torch.float32
    block_centroids = min(64, max(16, triton.next_power_of_2(num_centroids)))
    return {
        "BLOCK_ROWS": 64 if block_centroids < 64 else 128,
        "BLOCK_WIDTH": 32 if wide else 64,
        "BLOCK_CENTROIDS": block_centroids,
        "num_warps": 8,
        "num_stages": 3,
    }


def one_hot_shape(num_centroids: int) -> dict[str, int]:
    """Tile and launch of the one-hot sums."""
    block_centroids = max(16, triton.next_power_of_2(num_centroids))
    return {"BLOCK_ROWS": 64, "BLOCK_WIDTH": 128, "BLOCK_CENTROIDS": block_centroids, "num_warps": 8, "num_stages": 3}


def nearest(x: Tensor, centroids: Tensor, parent: Tensor | None, tile: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Assignment (N,) int64 and squared distance (N,) float32 of contiguous x (N, D), N > 0."""
    (num_rows, width), device = x.shape, x.device
    num_tiles = triton.cdiv(centroids.shape[0], tile["BLOCK_CENTROIDS"])
    terms_width = triton.cdiv(width, tile["BLOCK_WIDTH"]) * tile["BLOCK_WIDTH"]
    terms, half_norms = split_centroids(centroids, x.dtype, num_tiles * tile["BLOCK_CENTROIDS"], terms_width)
    assignment = torch.empty(num_rows, dtype=torch.int64, device=device)
    distance = torch.empty(num_rows, device=device)
    _nearest[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
        x,
        terms,
        half_norms,
        assignment if parent is None else parent,
        assignment,
        distance,
        num_rows,
        width,
        terms_width,
        num_tiles,
        RESTRICTED=parent is not None,
        **tile,
    )
    return assignment, distance


def one_hot_sums(x: Tensor, assignment: Tensor, num_centroids: int, tile: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Sums (K, D) float64 and counts (K,) int64 of contiguous x (N, D), N > 0, by one-hot products."""
    (num_rows, width), device = x.shape, x.device
    block_width, block_centroids = tile["BLOCK_WIDTH"], tile["BLOCK_CENTROIDS"]
    blocks = triton.cdiv(width, block_width)
    chunks, rows_per_program = row_chunks(num_rows, tile["BLOCK_ROWS"], device)
    sums = torch.empty(chunks, blocks * block_width * block_centroids, device=device)
    counts = torch.empty(chunks, block_centroids, dtype=torch.int32, device=device)
    _one_hot_sums[(blocks * chunks,)](x, assignment, sums, counts, num_rows, width, rows_per_program, **tile)
    total = add_partials(sums, torch.arange(0, chunks + 1, chunks, device=device)).view(block_centroids, blocks * block_width)
    return total[:num_centroids, :width].contiguous(), counts.sum(0)[:num_centroids]


def segment_sums(x: Tensor, assignment: Tensor, num_centroids: int, *, rows_per_segment: int = ROWS_PER_SEGMENT) -> tuple[Tensor, Tensor]:
    """Sums (K, D) float64 and counts (K,) int64 of contiguous x (N, D), N > 0, by sorting the rows.

    Segments of one centroid are consecutive. Only the device knows their number, so the grid is large enough for every case.
    """
    (num_rows, width), device = x.shape, x.device
    ordered, order = assignment.to(torch.int32).sort(stable=True)
    start = torch.searchsorted(ordered, torch.arange(num_centroids + 1, device=device, dtype=torch.int32))
    counts = start.diff()
    ends = ((counts + rows_per_segment - 1) // rows_per_segment).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    segment = torch.arange(triton.cdiv(num_rows, rows_per_segment) + num_centroids, device=device)
    centroid = torch.searchsorted(ends, segment, right=True).clamp_max(num_centroids - 1)
    first = start[centroid] + (segment - starts[centroid]) * rows_per_segment
    end = torch.minimum(first + rows_per_segment, start[centroid + 1])  # below first for the segments left over
    sums = torch.empty(segment.shape[0], width, device=device)
    block_width = min(256, max(16, triton.next_power_of_2(width)))
    grid = (segment.shape[0], triton.cdiv(width, block_width))
    _segment_sums[grid](x, order, first, end, sums, width, BLOCK_ROWS=32, BLOCK_WIDTH=block_width, num_warps=4)
    return add_partials(sums, starts), counts
