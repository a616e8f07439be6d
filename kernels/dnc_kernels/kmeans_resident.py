"""A Lloyd step in one read of x, for few centroids: their sums stay in registers while a program goes through its rows.

A program holds the centroids in shared memory and the sums (D, K) in registers. It takes a tile of rows, finds the nearest
centroids by one matrix product, and adds the rows to the sums by another, xᵀ · one-hot. Every program writes its own partial
sums, and those are added in a fixed order.
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

SUMS_IN_REGISTERS = 16_384  # elements of (D, K) that 8 warps hold beside everything else
SMALLEST, WIDEST, MOST_CENTROIDS = 16, 512, 32  # sides of the blocks that compile without spilling
ROOMY = ((8, 0), (9, 0))  # capabilities whose shared memory holds the widest block; elsewhere half of it fits


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def _lloyd_resident(
    x_ptr,  # (N, D)
    terms_ptr,  # (2 BLOCK_CENTROIDS, BLOCK_WIDTH)
    half_norm_ptr,  # (BLOCK_CENTROIDS,) float32
    parent_ptr,  # (N,) int64, or anything unless RESTRICTED
    assignment_ptr,  # (N,) int64
    distance_ptr,  # (N,) float32
    sums_ptr,  # (P, BLOCK_CENTROIDS, BLOCK_WIDTH) float32
    counts_ptr,  # (P, BLOCK_CENTROIDS) int32
    num_rows,
    rows_per_program,
    WIDTH: tl.constexpr,
    RESTRICTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_CENTROIDS: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_WIDTH)
    candidates = tl.arange(0, BLOCK_CENTROIDS)
    terms = tl.load(terms_ptr + tl.arange(0, 2 * BLOCK_CENTROIDS)[None, :] * BLOCK_WIDTH + columns[:, None])
    half_norms = tl.load(half_norm_ptr + candidates)
    sums = tl.zeros((BLOCK_WIDTH, BLOCK_CENTROIDS), tl.float32)
    counts = tl.zeros((BLOCK_CENTROIDS,), tl.int32)
    # The width is a constant so that these offsets are immediates; computed, they would cost the registers of the sums.
    offsets = tl.arange(0, BLOCK_ROWS)[:, None] * WIDTH + columns[None, :]
    first = program * rows_per_program
    for tile in range(0, tl.cdiv(tl.minimum(rows_per_program, num_rows - first), BLOCK_ROWS)):
        start = first + tile * BLOCK_ROWS
        rows = start + tl.arange(0, BLOCK_ROWS)
        taken = rows < num_rows
        inside = taken[:, None] & (columns < WIDTH)[None, :]
        x = tl.load(x_ptr + start.to(tl.int64) * WIDTH + offsets, mask=inside, other=0.0)
        # Before the products: x passes through registers here, and the products need some, too.
        norms = squared_norms(x)
        parent = tl.zeros((BLOCK_ROWS,), tl.int32)
        if RESTRICTED:
            parent = tl.load(parent_ptr + rows, mask=taken, other=-1).to(tl.int32)
            taken = parent >= 0
        products = add_products(tl.zeros((BLOCK_ROWS, 2 * BLOCK_CENTROIDS), tl.float32), x, terms)
        best = tl.full((BLOCK_ROWS,), float("inf"), tl.float32)
        best, nearest = improve(best, 2 * parent, products, half_norms, candidates, parent, RESTRICTED)
        nearest = tl.where(taken, nearest, -1)
        tl.store(assignment_ptr + rows, nearest.to(tl.int64), mask=rows < num_rows)
        distance = tl.where(taken, squared_distances(norms, best), 0.0)
        tl.store(distance_ptr + rows, distance, mask=rows < num_rows)
        member = nearest[:, None] == candidates[None, :]
        sums = add_members(sums, tl.trans(x), member)
        counts += tl.sum(member.to(tl.int32), 0)
    part = candidates[None, :] * BLOCK_WIDTH + columns[:, None]
    tl.store(sums_ptr + program.to(tl.int64) * (BLOCK_WIDTH * BLOCK_CENTROIDS) + part, sums)
    tl.store(counts_ptr + program * BLOCK_CENTROIDS + candidates, counts)


def shape(dtype: torch.dtype, width: int, num_centroids: int, device: torch.device) -> dict[str, int] | None:
    """Tile and launch of the kernel, or None where the sums do not fit into registers or the rows not into shared memory.

    float32 rows never fit: they are split into terms in registers, which takes the room of the sums.
    """
    block_width = max(SMALLEST, triton.next_power_of_2(width))
    block_centroids = max(SMALLEST, triton.next_power_of_2(num_centroids))
    roomy = device.type != "cuda" or torch.cuda.get_device_capability(device) in ROOMY
    widest = WIDEST if roomy else WIDEST // 2
    if dtype == torch.float32 or block_width > widest or block_centroids > MOST_CENTROIDS:
        return None
    rows = 64 if block_width * block_centroids <= SUMS_IN_REGISTERS // 2 else 32
    return {"BLOCK_ROWS": rows, "BLOCK_WIDTH": block_width, "BLOCK_CENTROIDS": block_centroids, "num_warps": 8, "num_stages": 3}


def lloyd_resident(x: Tensor, centroids: Tensor, parent: Tensor | None, tile: dict[str, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`lloyd_step` of contiguous x (N, D), N > 0, with the tile that `shape` gave."""
    (num_rows, width), (num_centroids, device) = x.shape, (centroids.shape[0], x.device)
    block_width, block_centroids = tile["BLOCK_WIDTH"], tile["BLOCK_CENTROIDS"]
    terms, half_norms = split_centroids(centroids, x.dtype, block_centroids, block_width)
    programs, rows_per_program = row_chunks(num_rows, tile["BLOCK_ROWS"], device)
    assignment = torch.empty(num_rows, dtype=torch.int64, device=device)
    distance = torch.empty(num_rows, device=device)
    sums = torch.empty(programs, block_width * block_centroids, device=device)
    counts = torch.empty(programs, block_centroids, dtype=torch.int32, device=device)
    _lloyd_resident[(programs,)](
        x,
        terms,
        half_norms,
        assignment if parent is None else parent,
        assignment,
        distance,
        sums,
        counts,
        num_rows,
        rows_per_program,
        WIDTH=width,
        RESTRICTED=parent is not None,
        **tile,
    )
    total = add_partials(sums, torch.arange(0, programs + 1, programs, device=device)).view(block_centroids, block_width)
    return assignment, distance, total[:num_centroids, :width].contiguous(), counts.sum(0)[:num_centroids]
