"""One pass over the rows of z: which can be in a pair, which columns are in use, and a copy for the matrix units.

The copy holds each row in canonical order as float16 numbers of z * 2**8. For float32 z each number is a sum of two, high + low.
That is 22 bits of mantissa, so three products (high high + high low + low high) are as good as one in float32.
The factor keeps the low parts of unit vectors above float16's subnormal range. It needs |z| < 255. A row beyond counts
as not finite: unit rows have |z| <= 1, so such a row comes from a training that diverged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SCALE, BOUND = tl.constexpr(256.0), tl.constexpr(255.0)  # values below the bound, scaled, are below float16's largest, 65504
USABLE, ZERO, NOT_FINITE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NARROWEST, WIDEST_BLOCK = 16, 64  # of a column block: what a matrix instruction takes, what a tile holds
TILE_ROWS = 16


class RowFacts(NamedTuple):
    """Facts of rows in canonical order.

    `halves` (n, blocks, parts, width) float16: the scaled copy, columns in blocks of `width`, padded with zeros.
    `norm_squared` (n,) float32, inf for a row that can be in no pair; `state` (n,) int32: USABLE, ZERO or NOT_FINITE
    (a value that is NaN, infinite or not below BOUND).
    `live` (n, 2) int32, in the order of z: first and one past the last column that is not zero (a sliced mask leaves few).
    """

    halves: Tensor
    norm_squared: Tensor
    state: Tensor
    live: Tensor


@triton.jit(do_not_specialize=["n"])
def _row_facts_kernel(
    z, order, halves, norm_squared, state, live, n, columns, blocks,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < n
    row = tl.load(order + place, mask=inside, other=0)
    total = tl.zeros((ROWS,), tl.float32)
    num_beyond = tl.zeros((ROWS,), tl.int32)
    first, last = tl.full((ROWS,), 2147483647, tl.int32), tl.full((ROWS,), 0, tl.int32)
    for block in range(0, blocks):
        column = block * WIDTH + tl.arange(0, WIDTH)
        mask = inside[:, None] & (column < columns)[None, :]
        value = tl.load(z + (row * columns)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(value * value, 1)
        held = tl.abs(value) < BOUND  # false for NaN, too
        num_beyond += tl.sum((~held).to(tl.int32), 1)
        first = tl.minimum(first, tl.min(tl.where(value != 0, column[None, :], 2147483647), 1))
        last = tl.maximum(last, tl.max(tl.where(value != 0, column[None, :] + 1, 0), 1))
        # Such a row is in no pair; zeros in place of what the copy cannot hold keep every product finite.
        scaled = tl.where(held, value * SCALE, 0.0)
        high = scaled.to(tl.float16)
        target = halves + ((place.to(tl.int64) * blocks + block) * (PARTS * WIDTH))[:, None] + tl.arange(0, WIDTH)[None, :]
        tl.store(target, high, mask=inside[:, None])
        if PARTS == 2:
            tl.store(target + WIDTH, (scaled - high.to(tl.float32)).to(tl.float16), mask=inside[:, None])
    found = tl.where(num_beyond > 0, NOT_FINITE, tl.where(last > 0, USABLE, ZERO))
    tl.store(norm_squared + place, tl.where(found == USABLE, total, float("inf")), mask=inside)
    tl.store(state + place, found, mask=inside)
    tl.store(live + 2 * row, tl.minimum(first, last), mask=inside)
    tl.store(live + 2 * row + 1, last, mask=inside)


def num_parts(z: Tensor) -> int:
    """Float16 numbers per value of z that keep its mantissa."""
    return 2 if z.dtype == torch.float32 else 1


def row_facts(z: Tensor, order: Tensor, parts: int) -> RowFacts:
    """Facts and copy in so many parts of the rows z[order]; z (n, D), order (n,) int64."""
    z = z.contiguous()
    n, columns = z.shape
    width = min(WIDEST_BLOCK, max(NARROWEST, triton.next_power_of_2(columns)))
    blocks = triton.cdiv(columns, width)
    facts = RowFacts(
        torch.empty(n, blocks, parts, width, dtype=torch.float16, device=z.device),
        torch.empty(n, dtype=torch.float32, device=z.device),
        torch.empty(n, dtype=torch.int32, device=z.device),
        torch.empty(n, 2, dtype=torch.int32, device=z.device),
    )
    if n:
        grid = (triton.cdiv(n, TILE_ROWS),)
        _row_facts_kernel[grid](z, order, *facts, n, columns, blocks, ROWS=TILE_ROWS, WIDTH=width, PARTS=parts, num_warps=4)
    return facts
