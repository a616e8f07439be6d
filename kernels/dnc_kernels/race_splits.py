"""A split race: how many programs share the references of a tile of anchors, and the merge of what each of them kept.

A rank with 128 anchors has eight tiles of them, which leaves most of a GPU idle however many references there are. So the tiles of
references of every segment are dealt in turn to several splits, each a program of its own. It keeps its own k best keys, and the k best of
all are among these. A key is computed from the same tile by the same products whoever owns it, and the order of keys, with the
position deciding between equals, is total. So the draws are those of a race that is not split, bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dnc_kernels.positives import NO_LEARNER, NUM_POSITIVES, ROW, SEGMENT_START, STATE, WINDOW
from dnc_kernels.rows import NOT_FINITE, USABLE, ZERO

LAST = tl.constexpr(2147483647)
MOST_SPLITS = 128  # the merge looks at so many keys of an anchor at a time
REFERENCES_PER_SPLIT = 256  # four tiles of the default width: less work is not worth the launch of the merge
WARPS_PER_PROCESSOR = 8  # of up to 255 registers a thread; the 65,536 registers of a multiprocessor hold no more
MERGED_ANCHORS = 16


class Kept(NamedTuple):
    """What the splits found, anchors in canonical order. Of an anchor's k slots a split fills min(k, wanted, its candidates)."""

    keys: Tensor  # (B, splits, k) float32, falling
    positions: Tensor  # (B, splits, k) int32, in the segment
    counts: Tensor  # (B, splits) int32: candidates


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of the GPU; the interpreter counts as one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def num_splits(anchor_tiles: int, num_references: int, num_warps: int, processors: int) -> int:
    """So many that all programs run at once. Of shapes alone: to look at the segments would wait for the device."""
    room = WARPS_PER_PROCESSOR // num_warps * processors
    return max(1, min(room // anchor_tiles, num_references // REFERENCES_PER_SPLIT, MOST_SPLITS))


def empty_kept(others: Tensor, splits: int) -> Kept:
    """Space for what so many splits keep for the anchors of `others` (B, 2k)."""
    shape = (others.shape[0], splits, others.shape[1] // 2)
    return Kept(
        torch.empty(shape, dtype=torch.float32, device=others.device),
        torch.empty(shape, dtype=torch.int32, device=others.device),
        torch.empty(shape[:2], dtype=torch.int32, device=others.device),
    )


@triton.jit
def add_counts(window, inside, num_candidates, num_slots, stats):
    """Add the counts of these anchors to `stats` (7,), in the order of `sampling.STATS`."""
    num_positives = tl.load(window + NUM_POSITIVES, mask=inside, other=0)
    state = tl.load(window + STATE, mask=inside, other=NO_LEARNER)
    taking_part = state == USABLE
    # Sums of integers are the same in any order, so these atomics are deterministic.
    tl.atomic_add(stats, tl.sum(taking_part.to(tl.int64), 0))
    tl.atomic_add(stats + 1, tl.sum((taking_part & (num_positives == 0)).to(tl.int64), 0))
    tl.atomic_add(stats + 2, tl.sum((taking_part & (num_candidates == 0)).to(tl.int64), 0))
    tl.atomic_add(stats + 3, tl.sum(tl.maximum(num_positives - num_candidates, 0).to(tl.int64), 0))
    tl.atomic_add(stats + 4, tl.sum(tl.maximum(num_positives - num_slots, 0).to(tl.int64), 0))
    tl.atomic_add(stats + 5, tl.sum((state == NOT_FINITE).to(tl.int64), 0))
    tl.atomic_add(stats + 6, tl.sum((state == ZERO).to(tl.int64), 0))


@triton.jit(do_not_specialize=["num_anchors", "num_slots", "splits"])
def _merge_kernel(
    windows, order, keys, positions, counts, others, stats, num_anchors, num_slots, splits,
    ANCHORS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The k best of sorted lists: again and again the best of their heads."""
    anchor = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    inside = anchor < num_anchors
    window = windows + anchor * WINDOW
    split = tl.arange(0, SPLITS)[None, :]
    of_split = anchor.to(tl.int64)[:, None] * splits + split
    count = tl.load(counts + of_split, mask=inside[:, None] & (split < splits), other=0)
    num_candidates = tl.sum(count, 1)
    num_wanted = tl.minimum(tl.load(window + NUM_POSITIVES, mask=inside, other=0), num_slots)
    length = tl.minimum(count, num_wanted[:, None])
    segment_start = tl.load(window + SEGMENT_START, mask=inside, other=0)
    row = tl.load(window + ROW, mask=inside, other=0).to(tl.int64)
    head = tl.zeros((ANCHORS, SPLITS), tl.int32)
    for slot in range(0, tl.max(tl.minimum(num_wanted, num_candidates), 0)):
        key = tl.load(keys + of_split * num_slots + head, mask=head < length, other=float("-inf"))
        position = tl.load(positions + of_split * num_slots + head, mask=head < length, other=LAST)
        largest_key = tl.max(key, 1)
        at = tl.min(tl.where(key == largest_key[:, None], position, LAST), 1)
        drawn = (largest_key > float("-inf")) & (slot < num_wanted)
        target = others + row * (2 * num_slots) + num_slots + slot
        tl.store(target, tl.load(order + segment_start + at, mask=drawn, other=0), mask=drawn)
        head += (position == at[:, None]).to(tl.int32)  # a position is in one split only
    add_counts(window, inside, num_candidates, num_slots, stats)


def merge_splits(windows: Tensor, order: Tensor, kept: Kept, others: Tensor, stats: Tensor) -> None:
    """Write the k best of all splits, and the counts; arguments as `race.draw_negatives`."""
    num_anchors, splits, num_slots = kept.keys.shape
    _merge_kernel[(triton.cdiv(num_anchors, MERGED_ANCHORS),)](
        windows, order, *kept, others, stats, num_anchors, num_slots, splits,
        ANCHORS=MERGED_ANCHORS, SPLITS=MOST_SPLITS, num_warps=4,
    )  # fmt: skip
