"""Weights of a backbone from a file."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import read_tensors


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"model.weights={path} does not exist; give none, pretrained, or the path of a .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = read_tensors(path)
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
    """Load a file into a network; of the file's entries only those of a classifier may be left over."""
    state = {key.removeprefix("module."): value for key, value in _read_weights(path).items()}
    own = network.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        raise InputError(
            f"model.weights={path} lacks {len(missing)} of the {len(own)} tensors of model.backbone={name}, first {missing[0]}; "
            "give weights of this backbone or change model.backbone"
        )
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    if wrong:
        key = wrong[0]
        raise InputError(
            f"model.weights={path}: {key} has shape {tuple(state[key].shape)}, model.backbone={name} needs {tuple(own[key].shape)}; "
            "give weights of this backbone or change model.backbone"
        )
    network.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
