"""What the files of a checkpoint hold, read as data and put back: nothing that somebody else wrote is executed.

DeepSpeed would unpickle its files, and so run code that they may hold. So its writer gets only tensors, numbers and text here, its
reader is not used, and everything that is read is checked before it reaches a network or an optimizer.

ZeRO 1 and 2 lay the parameters of a group end to end, pad them to a multiple of the number of processes, and give each process an
equal part: its partition, with the weights in fp32 and Adam's moments of them. So the written partitions without their padding,
end to end, are the whole group, and any number of processes cuts it anew. Every process reads only what it needs, and nothing
is written that a crash could leave behind. DeepSpeed's own way, the universal checkpoint, drops buffers such as BatchNorm's
running statistics and writes files for every parameter first.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.checkpoint import BASE_OPTIMIZER_STATE, OPTIMIZER_STATE_DICT, SINGLE_PARTITION_OF_FP32_GROUPS
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch import Tensor, nn

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import read_tensors, shorten
from dnc_dist.engine.state import TrainState
from dnc_dist.processes import distributed

_MODEL = "mp_rank_00_model_states.pt"
_log = logging.getLogger(__name__)
_CURE = "choose another checkpoint, or train the run again with this version"


class PlainFiles(TorchCheckpointEngine):
    """How DeepSpeed writes its files here: without objects of its own, which only unpickling could read back."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write one file; of ZeRO's state only the weights and the moments."""
        if (state := state_dict.get(OPTIMIZER_STATE_DICT)) is not None:
            state_dict = {OPTIMIZER_STATE_DICT: {name: state[name] for name in (BASE_OPTIMIZER_STATE, SINGLE_PARTITION_OF_FP32_GROUPS)}}
        torch.save(state_dict, path)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file as data."""
        return read_tensors(Path(path), _CURE)


class Saved(NamedTuple):
    """What the model's file of a checkpoint holds; ``optimizer`` is the moments by parameter, {} where ZeRO keeps them elsewhere."""

    weights: dict[str, Tensor]
    state: TrainState
    world_size: int
    optimizer: dict[int, dict[str, Tensor]]


def write_checkpoint(engine: Any, state: TrainState, folder: Path, tag: str) -> None:
    """Collective. Write the files of a checkpoint of the engine and the train state into ``folder / tag``."""
    client_state = {"train_state": state.state_dict(), "world_size": distributed.world_size()}
    engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)


def load_checkpoint(engine: Any, folder: Path, saved: Saved) -> None:
    """Collective. Restore parameters and optimizer of the engine, whatever number of processes wrote them.

    Raises:
        InputError: the files hold something else than this engine's state.
    """
    world = distributed.world_size()
    if saved.world_size != world:
        _log.info(f"checkpoint {folder} was written by {saved.world_size} process(es) and goes on with {world}")
    load_weights(engine.module, saved.weights, folder)
    load_optimizer(engine, folder, saved)


def read_model(folder: Path) -> Saved:
    """The objective's weights and the train state of a checkpoint; needs no engine, on any number of processes.

    Raises:
        InputError: the file is damaged, or was written by somebody else or another version.
    """
    path = folder / _MODEL
    found = read_tensors(path, _CURE)
    if not isinstance(found, dict) or not isinstance(found.get("world_size"), int):
        raise _wrong(path, "it is no checkpoint of a run")
    weights, optimizer = found.get("module"), found.get("optimizer")
    if not isinstance(weights, dict) or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
        raise _wrong(path, "it holds no weights")
    moments = optimizer.get("state") if isinstance(optimizer, dict) else {}
    return Saved(weights, TrainState.from_state_dict(found.get("train_state"), path), found["world_size"], _checked_states(moments, path))


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Load a network's own weights back.

    Raises:
        InputError: they are those of another network.
    """
    own = module.state_dict()
    if different := sorted(own.keys() ^ weights.keys()):
        raise _wrong(source, f"its weights are not those of the run's model, for example {shorten(different[0])}")
    for name, value in own.items():
        if weights[name].shape != value.shape or weights[name].dtype != value.dtype:
            raise _wrong(
                source,
                f"{name} has shape {tuple(weights[name].shape)} ({weights[name].dtype}) instead of {tuple(value.shape)} ({value.dtype})",
            )
    module.load_state_dict(dict(weights))


def load_optimizer(engine: Any, folder: Path, saved: Saved) -> None:
    """Restore the optimizer of the engine, whatever number of processes wrote the checkpoint; its rates stay those of the configuration.

    Raises:
        InputError: the files do not belong together, or to this engine.
    """
    optimizer, source = engine.optimizer, folder / _MODEL
    if engine.zero_optimization_stage() == 0:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, state in saved.optimizer.items():
            if number >= len(parameters) or any(value.dim() and value.shape != parameters[number].shape for value in state.values()):
                raise _wrong(source, "its optimizer state is not that of the run's model")
        optimizer.load_state_dict(optimizer.state_dict() | {"state": saved.optimizer})
        return
    sizes = [group["params"][0].numel() for group in optimizer.param_groups]
    lengths = [sum(parameter.numel() for parameter in group) for group in optimizer.bit16_groups]
    own = optimizer.state_dict()
    weights, states = cut_partition(folder, distributed.rank(), sizes, lengths)
    part = own | {BASE_OPTIMIZER_STATE: own[BASE_OPTIMIZER_STATE] | {"state": states}, SINGLE_PARTITION_OF_FP32_GROUPS: weights}
    # DeepSpeed picks the entry of this rank.
    optimizer.load_state_dict([part] * distributed.world_size(), load_from_fp32_weights=True)


def _wrong(path: Path, what: str) -> InputError:
    return InputError(f"{path} cannot be used: {what}; {_CURE}")


def _checked_states(states: Any, path: Path) -> dict[int, dict[str, Tensor]]:
    """The optimizer's state by number of parameter or group, as it should be."""
    sound = isinstance(states, dict) and all(
        isinstance(number, int) and number >= 0 and isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())
        for number, state in states.items()
    )
    # A state is there as a whole, or, before the first step, not at all.
    if not sound or any(state.keys() not in (set(), {"step", "exp_avg", "exp_avg_sq"}) for state in states.values()):
        raise _wrong(path, "it holds no optimizer state of this version")
    return states


def _read_partition(path: Path, lengths: Sequence[int]) -> tuple[list[Tensor], dict[int, dict[str, Tensor]]]:
    """What one process wrote of each group: the weights without padding, and the moments. Mapped, not read."""
    found = read_tensors(path, _CURE, mapped=True)
    content = found.get(OPTIMIZER_STATE_DICT) if isinstance(found, dict) else None
    content = content if isinstance(content, dict) else {}
    weights, base = content.get(SINGLE_PARTITION_OF_FP32_GROUPS), content.get(BASE_OPTIMIZER_STATE)
    states = _checked_states(base.get("state") if isinstance(base, dict) else None, path)
    flat = isinstance(weights, list) and all(isinstance(piece, Tensor) and piece.dim() == 1 for piece in weights)
    if not isinstance(weights, list) or not flat or len(weights) != len(lengths):
        raise _wrong(path, "it holds no weights of this run's groups")
    for group, piece in enumerate(weights):
        if any(value.dim() > 1 or (value.dim() == 1 and len(value) < len(piece)) for value in states.get(group, {}).values()):
            raise _wrong(path, "its moments are not those of its weights")
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
    files = [folder / f"zero_pp_rank_{writer}_mp_rank_00_optim_states.pt" for writer in range(_num_partitions(folder))]
    # Of the others' files only the bytes of this partition leave the disk.
    parts = [_read_partition(path, lengths) for path in files]
    weights, states = [], {}
    for group, (size, length) in enumerate(zip(sizes, lengths, strict=True)):
        # Saved without padding, unlike the moments.
        pieces = [part[group] for part, _ in parts]
        saved = [state.get(group, {}) for _, state in parts]
        if sum(map(len, pieces)) != length or any(state.keys() != saved[0].keys() for state in saved):
            raise _wrong(folder, "its optimizer files do not belong together")
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
    if not (number := len(list(folder.glob("zero_pp_rank_*_mp_rank_00_optim_states.pt")))):
        raise _wrong(folder, "it has no optimizer state of ZeRO 1 or 2")
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
