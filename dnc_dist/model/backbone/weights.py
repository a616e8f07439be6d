"""Weights of a backbone from a file."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor, nn

from dnc_dist.base.arrays import read_tensors
from dnc_dist.base.errors import InputError
from dnc_dist.processes import distributed

_KINDS = {"weight", "bias", "running_mean", "running_var"}
_CLASSIFIER = ("weight", "bias")
_log = logging.getLogger(__name__)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"model.weights={path} does not exist; give none, pretrained, or the path of a .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = read_tensors(path)
    except (OSError, MemoryError):  # the machine's
        raise
    except Exception as error:  # foreign bytes make the reader of .safetensors raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"model.weights={path} cannot be read as weights ({reason}); give a .pth with a state dict or a .safetensors file"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"model.weights={path} holds no state dict (names to tensors); save `model.state_dict()`")
    return state


def load_weights(network: nn.Module, path: Path, name: str) -> None:
    """Load a file into a network: by names, or, where the file has other names for the same tensors, one by one in their order.

    Of the file's entries only those of a classifier may be left over.

    Raises:
        InputError: the file cannot be read, or its tensors are not those of the network.
    """
    state = {key.removeprefix("module."): value for key, value in _read_weights(path).items()}
    target = network.state_dict()
    own = {key: value for key, value in target.items() if not _is_count(key)}
    missing = [key for key in own if key not in state]
    if missing:
        state = _renamed(own, {key: value for key, value in state.items() if not _is_count(key)}, missing, path, name)
    wrong = [key for key in own if state[key].shape != own[key].shape]
    if wrong:
        key = wrong[0]
        raise InputError(
            f"model.weights={path}: {key} has shape {tuple(state[key].shape)}, model.backbone={name} needs {tuple(own[key].shape)}; "
            "give weights of this backbone or change model.backbone"
        )
    network.load_state_dict({key: value for key, value in state.items() if key in target}, strict=False)


def _is_count(key: str) -> bool:
    """A BatchNorm's number of batches: older files lack it, and nothing here depends on it."""
    return key.endswith("num_batches_tracked")


def _renamed(own: dict[str, Tensor], given: dict[str, Tensor], missing: list[str], path: Path, name: str) -> dict[str, Tensor]:
    """The file's tensors under the network's names, tensor by tensor in their order. Rank 0 says so.

    Raises:
        InputError: they are not the same in number, shapes and order.
    """
    lacking = f"model.weights={path} lacks {len(missing)} of the {len(own)} tensors of model.backbone={name} by name, first {missing[0]}"
    cure = "give weights of this backbone or change model.backbone"
    if path.suffix == ".safetensors":
        raise InputError(
            f"{lacking}; {cure}. A file with other names for the same network has to be a .pth: a .safetensors file does not keep the order"
        )
    for number, (key, other) in enumerate(zip(own, given, strict=False)):
        if problem := _no_pair(key, own[key], other, given):
            raise InputError(f"{lacking}, and in order number {number} is no pair: {problem}; {cure}")
    if len(given) < len(own):
        raise InputError(f"{lacking}, and it has {len(given)} tensors only; {cure}")
    pairs = dict(zip(own, given, strict=False))
    left = list(given)[len(own) :]
    if len(left) > len(_CLASSIFIER) or any(key.rpartition(".")[2] != role for key, role in zip(left, _CLASSIFIER, strict=False)):
        raise InputError(
            f"{lacking}, and after {len(own)} tensors in order {len(left)} are left ({', '.join(left[:4])}), no classifier; {cure}"
        )
    if distributed.is_main():
        first, last = list(pairs.items())[:2], list(pairs.items())[-1]
        shown = ", ".join(f"{key} from {other}" for key, other in [*first, last])
        _log.info(
            f"model.weights={path} has other names than model.backbone={name}: its {len(own)} tensors were taken in their order, shapes "
            f"and kinds agree ({shown}); left over: {', '.join(left) or 'nothing'}"
        )
    return {key: given[other] for key, other in pairs.items()}


def _no_pair(key: str, tensor: Tensor, other: str, given: dict[str, Tensor]) -> str:
    """Why a tensor of the network cannot be the one that stands at its place in the file; empty if it can."""
    kinds = key.rpartition(".")[2], other.rpartition(".")[2]
    told = f"{key} {tuple(tensor.shape)} and the file's {other} {tuple(given[other].shape)}"
    if tensor.shape != given[other].shape:
        return f"{told} differ in shape"
    # Of one BatchNorm all four have the same shape.
    if kinds[0] != kinds[1] and set(kinds) & _KINDS:
        return f"{told} are a {kinds[0]} and a {kinds[1]}"
    if key != other and key in given:
        return f"{told}, which has another {key}"
    return ""
