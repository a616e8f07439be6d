"""How ZeRO lays a checkpoint out, whoever wrote it: names of files and of what they hold, and how the partitions of processes are cut.

ZeRO 1 and 2 lay the parameters of a group end to end, pad them to a multiple of the number of processes, and give each process an
equal part: its partition, with the weights in fp32 and Adam's moments of them. So the written partitions without their padding,
end to end, are the whole group, and any number of processes cuts it anew. Every process reads only what it needs, and nothing
is written that a crash could leave behind. DeepSpeed's own way, the universal checkpoint, drops buffers such as BatchNorm's
running statistics and writes files for every parameter first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dnc_dist.base.arrays import read_tensors
from dnc_dist.base.errors import InputError

MODEL = "mp_rank_00_model_states.pt"
PARTITION = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
# DeepSpeed's names in the file of a partition.
OPTIMIZER_STATE_DICT = "optimizer_state_dict"
BASE_OPTIMIZER_STATE = "base_optimizer_state"
SINGLE_PARTITION_OF_FP32_GROUPS = "single_partition_of_fp32_groups"
CURE = "choose another checkpoint, or train the run again with this version"


def wrong(path: Path, what: str) -> InputError:
    """The error of a checkpoint that is not what it should be."""
    return InputError(f"{path} cannot be used: {what}; {CURE}")


def checked_states(states: Any, path: Path) -> dict[int, dict[str, Tensor]]:
    """The optimizer's state by number of parameter or group, as it should be."""
    sound = isinstance(states, dict) and all(
        isinstance(number, int) and number >= 0 and isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())
        for number, state in states.items()
    )
    # A state is there as a whole, or, before the first step, not at all.
    if not sound or any(state.keys() not in (set(), {"step", "exp_avg", "exp_avg_sq"}) for state in states.values()):
        raise wrong(path, "it holds no optimizer state of this version")
    return states


def _read_partition(path: Path, lengths: Sequence[int]) -> tuple[list[Tensor], dict[int, dict[str, Tensor]]]:
    """What one process wrote of each group: the weights without padding, and the moments. Mapped, not read."""
    found = read_tensors(path, CURE, mapped=True)
    content = found.get(OPTIMIZER_STATE_DICT) if isinstance(found, dict) else None
    content = content if isinstance(content, dict) else {}
    weights, base = content.get(SINGLE_PARTITION_OF_FP32_GROUPS), content.get(BASE_OPTIMIZER_STATE)
    states = checked_states(base.get("state") if isinstance(base, dict) else None, path)
    flat = isinstance(weights, list) and all(isinstance(piece, Tensor) and piece.dim() == 1 for piece in weights)
    if not isinstance(weights, list) or not flat or len(weights) != len(lengths):
        raise wrong(path, "it holds no weights of this run's groups")
    for group, piece in enumerate(weights):
        if any(value.dim() > 1 or (value.dim() == 1 and len(value) < len(piece)) for value in states.get(group, {}).values()):
            raise wrong(path, "its moments are not those of its weights")
    return weights, states


def cut_partition(
    folder: Path, rank: int, sizes: Sequence[int], lengths: Sequence[int]
) -> tuple[list[Tensor], dict[int, dict[str, Tensor]]]:
    """Weights and state of each group that process ``rank`` would have saved, had so many processes written the checkpoint.

    Args:
        folder: a checkpoint of ZeRO 1 or 2, of any number of processes.
        rank: which process of those that go on.
        sizes: elements of a process's partition of each parameter group, with padding.
        lengths: elements of each whole group, without padding.
    """
    files = [folder / PARTITION.format(writer) for writer in range(_num_partitions(folder))]
    # Of the others' files only the bytes of this partition leave the disk.
    parts = [_read_partition(path, lengths) for path in files]
    weights, states = [], {}
    for group, (size, length) in enumerate(zip(sizes, lengths, strict=True)):
        # Saved without padding, unlike the moments.
        pieces = [part[group] for part, _ in parts]
        saved = [state.get(group, {}) for _, state in parts]
        if sum(map(len, pieces)) != length or any(state.keys() != saved[0].keys() for state in saved):
            raise wrong(folder, "its optimizer files do not belong together")
        weights.append(_cut(pieces, rank * size, size))
        states[group] = {
            name: _cut([state[name][: len(piece)] for state, piece in zip(saved, pieces, strict=True)], rank * size, size)
            if value.dim()
            else value.clone()  # the step count
            for name, value in saved[0].items()
        }
    return weights, states


def _num_partitions(folder: Path) -> int:
    """How many processes the optimizer state is spread over.

    Raises:
        InputError: over none.
    """
    if not (number := len(list(folder.glob(PARTITION.format("*"))))):
        raise wrong(folder, "it has no optimizer state of ZeRO 1 or 2")
    return number


def _cut(pieces: Sequence[Tensor], start: int, size: int) -> Tensor:
    """A copy of elements [start, start + size) of vectors laid end to end; beyond their end, zeros."""
    out = pieces[0].new_zeros(size)
    offset = 0
    for piece in pieces:
        first, last = max(start, offset), min(start + size, offset + len(piece))
        if first < last:
            out[first - start : last - start] = piece[first - offset : last - offset]
        offset += len(piece)
    return out
