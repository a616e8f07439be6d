"""Keys of the exponential race for a tile of pairs: which positions it holds, their row weights, their draws.

All logarithms are binary. Shapes: a tile has ANCHORS rows and REFERENCES columns, z has blocks of WIDTH columns in PARTS.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from dnc_kernels.reference_sampling import ANTIPODE_MIN
from dnc_kernels.rows import SCALE
from dnc_kernels.target import INTERPRETED

PHILOX_BLOCK = tl.constexpr(256)  # positions that share 64 Philox evaluations: part of the contract, see philox.py
LANES = tl.constexpr(4)
LN_2 = tl.constexpr(0.6931471805599453)
ANTIPODE = tl.constexpr(ANTIPODE_MIN)


@triton.jit
def log2(x):
    """Binary logarithm, absolute error about 2**-22: one instruction. All weights and draws are in this unit."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def tile_positions(tile, REFERENCES: tl.constexpr):
    """Positions in the segment of the columns of a tile, as base + offset, and the tile's Philox counters, a quarter as many.

    A tile takes all four outputs of its counters. Bits 0 and 3 of the column choose the output. One thread of the matrix
    unit holds these columns together, so draws and distances meet in registers.
    """
    counters: tl.constexpr = REFERENCES // LANES
    first = tile * counters
    base = first // (PHILOX_BLOCK // LANES) * PHILOX_BLOCK + first % (PHILOX_BLOCK // LANES)
    column = tl.arange(0, REFERENCES)
    lane = ((column >> 3) & 1) + 2 * (column & 1)
    counter = ((column >> 1) & 3) + 4 * (column >> 4)
    return base, lane * (PHILOX_BLOCK // LANES) + counter, first + tl.arange(0, counters)


@triton.jit
def draw_words(counters, id_low, id_high, seed, step, ANCHORS: tl.constexpr, REFERENCES: tl.constexpr):
    """32-bit draws (ANCHORS, REFERENCES) of the anchors with these row ids, columns as in `tile_positions`; see philox.py."""
    w0, w1, w2, w3 = tl.philox(
        seed, counters.to(tl.uint32)[None, :], id_low.to(tl.uint32)[:, None], id_high.to(tl.uint32)[:, None], step.to(tl.uint32)
    )
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # (ANCHORS, counters, 2, 2)
    words = tl.reshape(words, (ANCHORS, REFERENCES // 16, 4, 2, 2))
    return tl.reshape(tl.permute(words, (0, 1, 3, 2, 4)), (ANCHORS, REFERENCES))


@triton.jit
def log2_exponentials(words):
    """log2 of the Exponential(1) draws E = -log(1 - v), v = (word + 1/2) / 2**32, up to a constant.

    Draws that win come from near v = 0; there E is taken by its series. Elsewhere it is taken from 1 - v, which is exact.
    """
    small = words < 33554432  # v < 2**-7
    x = tl.where(small, words, words ^ 0xFFFFFFFF).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    series = x * (1.0 + x * (0.5 + x * (0.3333333333333333 + x * 0.25))) * (1.0 / LN_2)
    return log2(tl.where(small, series, -log2(x)))


@triton.jit
def log2_weights(
    anchor_halves, reference_halves, anchor_norm, norm_squared, offset, length, first_block, end_block,
    cutoff_squared, limit_squared, log_distance_factor, log_antipode_factor,
    ANCHORS: tl.constexpr, REFERENCES: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """log2 of the row weights of a tile (Wu et al. 2017, eq. 4-5), is the reference within the limit, is it usable."""
    product = tl.zeros((ANCHORS, REFERENCES), tl.float32)
    for block in range(first_block, end_block):
        column = block * (PARTS * WIDTH) + tl.arange(0, WIDTH)[None, :]
        high = tl.load(anchor_halves + column)
        other_high = tl.load(reference_halves + column)
        product = tl.dot(high, tl.trans(other_high), product)
        if PARTS == 2:
            low = tl.load(anchor_halves + column + WIDTH)
            product = tl.dot(low, tl.trans(other_high), product)
            other_low = tl.load(reference_halves + column + WIDTH)
            product = tl.dot(high, tl.trans(other_low), product)
    other_norm = tl.load(norm_squared + offset, mask=offset < length, other=float("inf"))
    usable = other_norm < float("inf")
    squared = anchor_norm[:, None] + other_norm[None, :] - product * (2.0 / (SCALE * SCALE))
    within = (squared <= limit_squared) & usable[None, :]
    # Both logarithms see clamped values only; what is not `within` is masked by the caller.
    squared = tl.maximum(squared, cutoff_squared)
    antipode = tl.maximum(1.0 - 0.25 * squared, ANTIPODE)
    return log_distance_factor * log2(squared) + log_antipode_factor * log2(antipode), within, usable
