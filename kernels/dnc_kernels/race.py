"""Distance-weighted negatives: an exponential race over the pairs of a tile, which keeps only the k best so far.

A program owns a tile of anchors in canonical order. It goes through the segments of their learners among the references, a tile
of pairs at a time: squared distances from the matrix units, log2 weights, log2 of the exponential draws, the k largest.
Where there are few tiles of anchors, several programs share the segments of one (`race_splits.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dnc_kernels.contract import Sampling
from dnc_kernels.positives import (
    ID_HIGH,
    ID_LOW,
    LARGEST,
    LIVE_END,
    LIVE_START,
    NO_SEGMENT,
    NORM,
    NUM_POSITIVES,
    ROW,
    RUN_END,
    RUN_START,
    SEGMENT_END,
    SEGMENT_START,
    WINDOW,
    Prepared,
)
from dnc_kernels.race_keys import LANES, PHILOX_BLOCK, draw_words, log2, log2_exponentials, log2_weights, tile_positions
from dnc_kernels.race_splits import add_counts, empty_kept, merge_splits, num_processors, num_splits
from dnc_kernels.reference_sampling import FLOOR_BEYOND, FLOOR_WITHIN

WITHIN, BEYOND = tl.constexpr(FLOOR_WITHIN), tl.constexpr(FLOOR_BEYOND)
LAST = tl.constexpr(2147483647)
RUN_TIME = ("cutoff_squared", "limit_squared", "log_distance_factor", "log_antipode_factor", "num_anchors", "num_references")
KEPT_FEW, KEPT_MANY = 4, 8  # negatives kept in one pass over a segment; more of them take more passes


class Tile(NamedTuple):
    """Shape of a tile of pairs and of the program that works on it."""

    anchors: int
    references: int
    num_warps: int
    num_stages: int


# For up to 4096, up to 16384 and more anchors: large tiles read each row less often, small ones keep more of the GPU at
# work. Before Hopper, and on GPUs of capability 12, matrix units take their operands from registers, which leaves fewer for
# the pairs: there 64 anchors take 194 instructions a pair where 32 take 125 (D = 512, capability 8.0).
TILES_HOPPER = (Tile(16, 64, 4, 3), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3))
TILES_BEFORE = (Tile(16, 64, 4, 3), Tile(32, 64, 4, 3), Tile(32, 64, 4, 3))


def default_tile(num_anchors: int, device: torch.device) -> Tile:
    """Shape for so many anchors on this device; on capability 8.0 and 9.0 every default is free of register spills."""
    hopper = device.type == "cuda" and (9, 0) <= torch.cuda.get_device_capability(device) < (12, 0)
    return (TILES_HOPPER if hopper else TILES_BEFORE)[(num_anchors > 4096) + (num_anchors > 16384)]


@triton.jit
def _next_segment(window, inside, after):
    """Smallest segment start of the tile's anchors beyond `after`, NO_SEGMENT if there is none."""
    starts = tl.load(window + SEGMENT_START, mask=inside, other=NO_SEGMENT)
    return tl.min(tl.where(starts > after, starts, NO_SEGMENT), 0)


@triton.jit
def _segment(start, window, inside, REFERENCES: tl.constexpr, WIDTH: tl.constexpr):
    """Of the segment at `start`: its end, its number of tiles, its column blocks, and its anchors' runs as positions.

    The windows are read again here, once a segment, because there are no registers left to keep them.
    """
    member = tl.load(window + SEGMENT_START, mask=inside, other=NO_SEGMENT) == start
    end = tl.max(tl.load(window + SEGMENT_END, mask=member, other=0), 0)
    tail = (end - start) % PHILOX_BLOCK
    counters = REFERENCES // LANES
    num_tiles = (end - start) // PHILOX_BLOCK * (PHILOX_BLOCK // REFERENCES)
    num_tiles += (tl.minimum(tail, PHILOX_BLOCK // LANES) + counters - 1) // counters
    # A column where every anchor is zero adds nothing to a product: sliced masks leave only their own columns.
    first_block = tl.min(tl.load(window + LIVE_START, mask=member, other=LAST), 0) // WIDTH
    end_block = (tl.max(tl.load(window + LIVE_END, mask=member, other=0), 0) + WIDTH - 1) // WIDTH
    # For an anchor of another segment all of this one counts as its own class.
    run_start = tl.load(window + RUN_START, mask=member, other=start)
    run_length = tl.where(member, tl.load(window + RUN_END, mask=member, other=0) - run_start, LAST)
    return end, num_tiles, first_block, end_block, run_start - start, run_length


@triton.jit(do_not_specialize=list(RUN_TIME))
def _largest_weight_kernel(
    windows, anchor_halves, reference_halves, norm_squared,
    cutoff_squared, limit_squared, log_distance_factor, log_antipode_factor, num_anchors, num_references, stride,
    ANCHORS: tl.constexpr, REFERENCES: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Largest log2 weight within the limit of each anchor, 0 if there is none: mode "reference" adds floors relative to it."""
    anchor = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    inside = anchor < num_anchors
    window = windows + anchor * WINDOW
    halves = anchor_halves + (tl.minimum(anchor, num_anchors - 1).to(tl.int64) * stride)[:, None]
    largest = tl.full((ANCHORS,), float("-inf"), tl.float32)
    start = _next_segment(window, inside, -1)
    while start < NO_SEGMENT:
        end, num_tiles, first_block, end_block, run_first, run_length = _segment(start, window, inside, REFERENCES, WIDTH)
        for tile in range(0, num_tiles):
            base, offset, _ = tile_positions(tile, REFERENCES)
            place = tl.minimum(start + base + offset, num_references - 1)
            reference = reference_halves + (place.to(tl.int64) * stride)[:, None]
            norm = tl.load(window + NORM, mask=inside, other=0).to(tl.float32, bitcast=True)
            weight, within, _ = log2_weights(
                halves, reference, norm, norm_squared + start + base, offset, end - start - base, first_block, end_block,
                cutoff_squared, limit_squared, log_distance_factor, log_antipode_factor, ANCHORS, REFERENCES, WIDTH, PARTS,
            )  # fmt: skip
            candidate = within & ((offset[None, :] + (base - run_first)[:, None]).to(tl.uint32) >= run_length.to(tl.uint32)[:, None])
            largest = tl.maximum(largest, tl.max(tl.where(candidate, weight, float("-inf")), 1))
        start = _next_segment(window, inside, start)
    tl.store(window + LARGEST, tl.where(largest == float("-inf"), 0.0, largest).to(tl.int32, bitcast=True), mask=inside)


@triton.jit(do_not_specialize=[*RUN_TIME, "num_slots"], do_not_specialize_on_alignment=["seed", "step"])
def _sample_kernel(
    windows, anchor_halves, order, reference_halves, norm_squared, seed, step, others, stats, keys, positions, counts,
    cutoff_squared, limit_squared, log_distance_factor, log_antipode_factor, num_anchors, num_references, num_slots, stride,
    ANCHORS: tl.constexpr, REFERENCES: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, KEPT: tl.constexpr, FLOORS: tl.constexpr,
):  # fmt: skip
    """The draws of a tile of anchors into `others`; with splits, what this split kept into `keys`, `positions` and `counts`."""
    anchor = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    inside = anchor < num_anchors
    window = windows + anchor * WINDOW
    halves = anchor_halves + (tl.minimum(anchor, num_anchors - 1).to(tl.int64) * stride)[:, None]
    seed_value, step_value = tl.load(seed), tl.load(step)

    num_candidates = tl.zeros((ANCHORS,), tl.int32)
    last_key, last_position = tl.full((ANCHORS,), float("inf"), tl.float32), tl.full((ANCHORS,), -1, tl.int32)
    slot = tl.arange(0, KEPT)[None, :]
    done, most = 0, 1
    while done < most:
        # A slot that the row does not want holds +inf: nothing displaces it. Free slots differ in position only.
        num_wanted = tl.minimum(tl.load(window + NUM_POSITIVES, mask=inside, other=0), num_slots)
        best_key = tl.where(slot < (num_wanted - done)[:, None], float("-inf"), float("inf"))
        best_position = tl.zeros((ANCHORS, KEPT), tl.int32) + (LAST - slot)
        start = _next_segment(window, inside, -1)
        while start < NO_SEGMENT:
            end, num_tiles, first_block, end_block, run_first, run_length = _segment(start, window, inside, REFERENCES, WIDTH)
            first_tile, step_of_tiles = 0, 1
            if keys is not None:
                first_tile, step_of_tiles = tl.program_id(1), tl.num_programs(1)
            for tile in range(first_tile, num_tiles, step_of_tiles):
                base, offset, counters = tile_positions(tile, REFERENCES)
                place = tl.minimum(start + base + offset, num_references - 1)
                reference = reference_halves + (place.to(tl.int64) * stride)[:, None]
                norm = tl.load(window + NORM, mask=inside, other=0).to(tl.float32, bitcast=True)
                weight, within, usable = log2_weights(
                    halves, reference, norm, norm_squared + start + base, offset, end - start - base, first_block, end_block,
                    cutoff_squared, limit_squared, log_distance_factor, log_antipode_factor, ANCHORS, REFERENCES, WIDTH, PARTS,
                )  # fmt: skip
                candidate = (offset[None, :] + (base - run_first)[:, None]).to(tl.uint32) >= run_length.to(tl.uint32)[:, None]
                if FLOORS:
                    largest = tl.load(window + LARGEST, mask=inside, other=0).to(tl.float32, bitcast=True)
                    relative = tl.minimum(weight - largest[:, None], 0.0)  # only rows of its own class have more
                    weight = log2(tl.where(within, tl.exp2(relative) + WITHIN, BEYOND))
                    candidate = candidate & usable[None, :]
                else:
                    candidate = candidate & within
                # The k largest of log w - log E are k draws without replacement (Efraimidis and Spirakis 2006).
                id_low, id_high = tl.load(window + ID_LOW, mask=inside, other=0), tl.load(window + ID_HIGH, mask=inside, other=0)
                words = draw_words(counters, id_low, id_high, seed_value, step_value, ANCHORS, REFERENCES)
                key = tl.where(candidate, weight - log2_exponentials(words), float("-inf"))
                if done == 0:
                    num_candidates += tl.sum((key > float("-inf")).to(tl.int32), 1)
                largest_key, worst = tl.max(key, 1), tl.min(best_key, 1)
                while tl.max(((largest_key >= worst) & (largest_key > float("-inf"))).to(tl.int32), 0) > 0:
                    at_offset = tl.min(tl.where(key == largest_key[:, None], offset[None, :], LAST), 1)
                    at = base + at_offset
                    worst_at = tl.max(tl.where(best_key == worst[:, None], best_position, -1), 1)
                    better = (largest_key > worst) | ((largest_key == worst) & (at < worst_at))
                    # Earlier passes wrote all that comes before the last key they wrote.
                    unwritten = (largest_key < last_key) | ((largest_key == last_key) & (at > last_position))
                    entering = better & unwritten & (largest_key > float("-inf"))
                    displaced = entering[:, None] & (best_position == worst_at[:, None]) & (best_key == worst[:, None])
                    best_key = tl.where(displaced, largest_key[:, None], best_key)
                    best_position = tl.where(displaced, at[:, None], best_position)
                    key = tl.where(offset[None, :] == at_offset[:, None], float("-inf"), key)
                    largest_key, worst = tl.max(key, 1), tl.min(best_key, 1)
            start = _next_segment(window, inside, start)

        best_key = tl.where(best_key == float("inf"), float("-inf"), best_key)
        segment_start = tl.load(window + SEGMENT_START, mask=inside, other=0)
        row = tl.load(window + ROW, mask=inside, other=0).to(tl.int64)
        of_split = anchor.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        for kept in range(0, KEPT):
            largest_key = tl.max(best_key, 1)
            at = tl.min(tl.where(best_key == largest_key[:, None], best_position, LAST), 1)
            drawn = largest_key > float("-inf")
            if keys is None:
                target = others + row * (2 * num_slots) + num_slots + done + kept
                tl.store(target, tl.load(order + segment_start + at, mask=drawn, other=0), mask=drawn)
            else:
                target = of_split * num_slots + done + kept
                tl.store(keys + target, largest_key, mask=drawn)
                tl.store(positions + target, at, mask=drawn)
            best_key = tl.where(best_position == at[:, None], float("-inf"), best_key)
            last_key, last_position = largest_key, at
        done += KEPT
        num_wanted = tl.minimum(tl.load(window + NUM_POSITIVES, mask=inside, other=0), num_slots)
        most = tl.max(tl.minimum(num_wanted, num_candidates), 0)

    if keys is None:
        add_counts(window, inside, num_candidates, num_slots, stats)
    else:
        tl.store(counts + anchor.to(tl.int64) * tl.num_programs(1) + tl.program_id(1), num_candidates, mask=inside)


def draw_negatives(windows: Tensor, rows: Prepared, others: Tensor, stats: Tensor, n: float, sampling: Sampling) -> None:
    """Write the negatives of every anchor into others[:, P:] in the order of their draw, and add the counts to `stats`.

    Args:
        windows: (B, 16) int32 of `find_positives`.
        others: (B, 2P) int64, filled with -1 where no negative comes; `stats` (7,) int64.
        n: of the density of distances.
        sampling: its seed and step are 0-d int64 tensors here.
    """
    num_anchors, num_slots = others.shape[0], others.shape[1] // 2
    if not num_anchors:
        return
    tile = default_tile(num_anchors, others.device)
    own, references, order, floors = rows.anchor_facts, rows.facts, rows.references.order, sampling.mode == "reference"
    anchor_tiles, num_references = triton.cdiv(num_anchors, tile.anchors), order.shape[0]
    # Mode "reference" is not split: its floors need the largest weight of all references first.
    splits = 1 if floors else num_splits(anchor_tiles, num_references, tile.num_warps, num_processors(others.device))
    kept = empty_kept(others, splits) if splits > 1 else None
    _, blocks, parts, width = own.halves.shape
    constants = (sampling.cutoff**2, sampling.nonzero_loss_cutoff**2, 0.5 * (2.0 - n), -0.5 * (n - 3.0))
    shape = {"ANCHORS": tile.anchors, "REFERENCES": tile.references, "WIDTH": width, "PARTS": parts}
    if floors:
        _largest_weight_kernel[(anchor_tiles,)](
            windows, own.halves, references.halves, references.norm_squared,
            *constants, num_anchors, num_references, blocks * parts * width,
            **shape, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    _sample_kernel[(anchor_tiles, splits)](
        windows, own.halves, order, references.halves, references.norm_squared, sampling.seed, sampling.step,
        *((others, stats, None, None, None) if kept is None else (None, None, *kept)),
        *constants, num_anchors, num_references, num_slots, blocks * parts * width,
        **shape, KEPT=KEPT_FEW if num_slots <= KEPT_FEW else KEPT_MANY, FLOORS=floors,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if kept is not None:
        merge_splits(windows, order, kept, others, stats)
