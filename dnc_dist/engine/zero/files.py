"""What DeepSpeed's files hold here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from dnc_dist.base.arrays import read_tensors
from dnc_dist.engine.zero.layout import BASE_OPTIMIZER_STATE, CURE, OPTIMIZER_STATE_DICT, SINGLE_PARTITION_OF_FP32_GROUPS


class PlainFiles(TorchCheckpointEngine):
    """Without objects of its own, which only unpickling could read back. They are not written yet when DeepSpeed has saved them."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[str, Any] = {}

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Take in one file; of ZeRO's state only the weights and the moments."""
        if (state := state_dict.get(OPTIMIZER_STATE_DICT)) is not None:
            state_dict = {OPTIMIZER_STATE_DICT: {name: state[name] for name in (BASE_OPTIMIZER_STATE, SINGLE_PARTITION_OF_FP32_GROUPS)}}
        self._files[Path(path).name] = state_dict

    def taken(self) -> dict[str, Any]:
        """What the files of this rank hold, by name, since the last call. The tensors are those that are trained, not copies."""
        files, self._files = self._files, {}
        return files

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file as data."""
        return read_tensors(Path(path), CURE)
