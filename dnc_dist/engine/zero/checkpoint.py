"""What the files of a checkpoint hold, read as data and put back: nothing that somebody else wrote is executed.

DeepSpeed would unpickle its files, and so run code that they may hold. So its writer gets only tensors, numbers and text here, its
reader is not used, and everything that is read is checked before it reaches a network or an optimizer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dnc_dist.base.arrays import read_tensors
from dnc_dist.base.foreign import shorten
from dnc_dist.engine.state import TrainState
from dnc_dist.engine.zero.layout import (
    BASE_OPTIMIZER_STATE,
    CURE,
    MODEL,
    SINGLE_PARTITION_OF_FP32_GROUPS,
    checked_states,
    cut_partition,
    wrong,
)
from dnc_dist.engine.zero.plain import PlainEngine
from dnc_dist.processes import distributed
from dnc_dist.processes.transfer import EndToEnd, Snapshot, with_tensors

_log = logging.getLogger(__name__)


class Saved(NamedTuple):
    """What the model's file of a checkpoint holds; ``optimizer`` is the moments by parameter, {} where ZeRO keeps them elsewhere."""

    weights: dict[str, Tensor]
    state: TrainState
    world_size: int
    optimizer: dict[int, dict[str, Tensor]]


def prepare_checkpoint(
    engine: Any, state: TrainState, folder: Path, tag: str, snapshot: Snapshot | None = None
) -> Callable[[], list[Path]]:
    """Collective. What writes this rank's files of a checkpoint of the engine and the train state into ``folder / tag``.

    Args:
        engine: what is trained.
        state: where the run stands.
        folder: of the checkpoints.
        tag: name of the folder in it, which may be there already.
        snapshot: what copies the state, so that any thread may write the files later; None: they have to be written before the next step.

    Returns:
        A function that writes the files and returns their paths; no collective.
    """
    client_state = {"train_state": state.state_dict(), "world_size": distributed.world_size()}
    if isinstance(engine, PlainEngine):
        files = engine.files(client_state)
    else:
        # Here it makes the folder, and its ranks wait for each other; ``PlainFiles`` keeps what it would write.
        engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)
        files = engine.checkpoint_engine.taken()
    if snapshot is None:
        return partial(_write, folder / tag, files)
    copied, wait = snapshot.take(files), snapshot.wait

    def write() -> list[Path]:
        wait()
        return _write(folder / tag, copied)

    return write


def _write(folder: Path, files: Mapping[str, Any]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        torch.save(with_tensors(content, lambda _, value: value.joined() if isinstance(value, EndToEnd) else value), folder / name)
    return [folder / name for name in files]


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
    path = folder / MODEL
    found = read_tensors(path, CURE)
    if not isinstance(found, dict) or not isinstance(found.get("world_size"), int):
        raise wrong(path, "it is no checkpoint of a run")
    weights, optimizer = found.get("module"), found.get("optimizer")
    if not isinstance(weights, dict) or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
        raise wrong(path, "it holds no weights")
    moments = optimizer.get("state") if isinstance(optimizer, dict) else {}
    return Saved(weights, TrainState.from_state_dict(found.get("train_state"), path), found["world_size"], checked_states(moments, path))


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Load a network's own weights back.

    Raises:
        InputError: they are those of another network.
    """
    own = module.state_dict()
    if different := sorted(own.keys() ^ weights.keys()):
        raise wrong(source, f"its weights are not those of the run's model, for example {shorten(different[0])}")
    for name, value in own.items():
        if weights[name].shape != value.shape or weights[name].dtype != value.dtype:
            raise wrong(
                source,
                f"{name} has shape {tuple(weights[name].shape)} ({weights[name].dtype}) instead of {tuple(value.shape)} ({value.dtype})",
            )
    module.load_state_dict(dict(weights))


def load_optimizer(engine: Any, folder: Path, saved: Saved) -> None:
    """Restore the optimizer of the engine, whatever number of processes wrote the checkpoint; its rates stay those of the configuration.

    Raises:
        InputError: the files do not belong together, or to this engine.
    """
    optimizer, source = engine.optimizer, folder / MODEL
    if engine.zero_optimization_stage() == 0:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, state in saved.optimizer.items():
            if number >= len(parameters) or any(value.dim() and value.shape != parameters[number].shape for value in state.values()):
                raise wrong(source, "its optimizer state is not that of the run's model")
        optimizer.load_state_dict(optimizer.state_dict() | {"state": saved.optimizer})
        return
    if isinstance(engine, PlainEngine):
        lengths = [sum(parameter.numel() for parameter in group["params"]) for group in optimizer.param_groups]
        engine.load_moments(cut_partition(folder, 0, lengths, lengths)[1])
        return
    sizes = [group["params"][0].numel() for group in optimizer.param_groups]
    lengths = [sum(parameter.numel() for parameter in group) for group in optimizer.bit16_groups]
    own = optimizer.state_dict()
    weights, states = cut_partition(folder, distributed.rank(), sizes, lengths)
    part = own | {BASE_OPTIMIZER_STATE: own[BASE_OPTIMIZER_STATE] | {"state": states}, SINGLE_PARTITION_OF_FP32_GROUPS: weights}
    # DeepSpeed picks the entry of this rank.
    optimizer.load_state_dict([part] * distributed.world_size(), load_from_fp32_weights=True)
