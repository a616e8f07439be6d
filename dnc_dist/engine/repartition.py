"""The optimizer state of a checkpoint for another number of processes than wrote it.

ZeRO 1 and 2 lay the parameters of a group end to end, pad them to a multiple of the number of processes, and give each process an
equal part: its partition, with the weights in fp32 and Adam's moments of them. So the written partitions without their padding,
end to end, are the whole group, and another number of processes cuts it anew. Every process reads only what it needs, and nothing
is written that a crash could leave behind. DeepSpeed's own way, the universal checkpoint, drops buffers such as BatchNorm's
running statistics and writes files for every parameter first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import BASE_OPTIMIZER_STATE, OPTIMIZER_STATE_DICT, SINGLE_PARTITION_OF_FP32_GROUPS
from torch import Tensor


def num_partitions(folder: Path) -> int:
    """How many processes a checkpoint's optimizer state is spread over; 0 without ZeRO, where it is whole."""
    return len(list(folder.glob("zero_pp_rank_*_optim_states.pt")))


def cut_partition(folder: Path, rank: int, sizes: list[int]) -> dict[str, Any]:
    """The state that process ``rank`` of DeepSpeed's ZeRO optimizer would have saved, had so many processes written the checkpoint.

    Args:
        folder: a checkpoint of ZeRO 1 or 2, of any number of processes.
        rank: which process of those that go on.
        sizes: elements of a process's partition of each parameter group, with padding.
    """
    # Mapped, not read: of the others' files only the bytes of this partition leave the disk.
    written = [
        torch.load(folder / f"zero_pp_rank_{writer}_mp_rank_00_optim_states.pt", map_location="cpu", mmap=True, weights_only=False)
        for writer in range(num_partitions(folder))
    ]
    parts = [content[OPTIMIZER_STATE_DICT] for content in written]
    weights, states = [], {}
    for group, size in enumerate(sizes):
        # Saved without padding, unlike the moments.
        pieces = [part[SINGLE_PARTITION_OF_FP32_GROUPS][group] for part in parts]
        weights.append(_cut(pieces, rank * size, size))
        # Empty before the first step.
        saved = [part[BASE_OPTIMIZER_STATE]["state"].get(group, {}) for part in parts]
        states[group] = {
            name: _cut([state[name][: len(piece)] for state, piece in zip(saved, pieces, strict=True)], rank * size, size)
            if value.dim()
            else value.clone()  # the step count
            for name, value in saved[0].items()
        }
    base = parts[0][BASE_OPTIMIZER_STATE] | {"state": states}
    return parts[0] | {BASE_OPTIMIZER_STATE: base, SINGLE_PARTITION_OF_FP32_GROUPS: weights}


def _cut(pieces: list[Tensor], start: int, size: int) -> Tensor:
    """A copy of elements [start, start + size) of vectors laid end to end; beyond their end, zeros."""
    out = pieces[0].new_zeros(size)
    offset = 0
    for piece in pieces:
        first, last = max(start, offset), min(start + size, offset + len(piece))
        if first < last:
            out[first - start : last - start] = piece[first - offset : last - offset]
        offset += len(piece)
    return out
