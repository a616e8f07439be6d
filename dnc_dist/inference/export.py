"""A model alone in a folder: weights, configuration, a card; loadable as the run itself is, with equal embeddings."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import safetensors.torch

from dnc_dist.base.errors import InputError
from dnc_dist.base.files import is_part_of, replacing
from dnc_dist.config import RunConfig, dump_config
from dnc_dist.embedder import METADATA, WEIGHTS_FILE, Embedder
from dnc_dist.inference.card import card
from dnc_dist.inference.onnx import check_packages, onnx_bytes
from dnc_dist.rundir import CONFIG_FILE

CARD_FILE, ONNX_FILE = "README.md", "model.onnx"
_FILES = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, ONNX_FILE)


def export(model: Embedder, out: Path, *, onnx: bool, tell: Callable[[str], None]) -> None:
    """Write ``model.safetensors``, ``config.yaml`` and ``README.md`` into the folder ``out``, with ``onnx`` also ``model.onnx``.

    Raises:
        InputError: the folder holds something else, or the model itself, or the packages for ONNX are not installed.
        RunError: the ONNX model computes something else than this one.
    """
    if onnx:
        check_packages()
    if out.is_dir():
        if other := sorted(path.name for path in out.iterdir() if not _ours(path)):
            raise InputError(f"--out {out} holds {other[0]}, which no export has; give a new folder, or one that was exported into before")
    elif out.exists():
        raise InputError(f"--out {out} is a file; give a folder")
    if out.resolve() == model.source.resolve():
        raise InputError(f"--out {out} is the model that is exported; give another folder")
    graph, difference = onnx_bytes(model) if onnx else (None, None)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.network.state_dict().items()}
    contents = {
        WEIGHTS_FILE: safetensors.torch.save(weights, {METADATA: json.dumps(asdict(model.origin))}),
        CONFIG_FILE: dump_config(_without_places(model.cfg)).encode(),
        CARD_FILE: card(model, difference).encode("utf-8", "backslashreplace"),
    }
    if graph is not None:
        contents[ONNX_FILE] = graph
        tell(f"{out / ONNX_FILE}: largest difference from torch in a coordinate {difference:.1e}")
    out.mkdir(parents=True, exist_ok=True)
    before = list(out.iterdir())
    with ExitStack() as stack:
        # All is written before anything of an earlier export goes. The weights take their place last: a folder that has them is whole.
        for name, content in contents.items():
            file = stack.enter_context(replacing(out / name))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for path in before:
            path.unlink()


def _ours(path: Path) -> bool:
    return path.is_file() and (path.name in _FILES or any(is_part_of(path, name) for name in _FILES))


def _without_places(cfg: RunConfig) -> RunConfig:
    """The configuration without the folders of the machine that the model was trained on."""
    weights = cfg.model.weights if cfg.model.weights in ("none", "pretrained") else Path(cfg.model.weights).name
    changes = {
        "run": cfg.run.model_copy(update={"dir": Path("runs")}),
        "data": cfg.data.model_copy(update={"root": Path(Path(cfg.data.root).name), "cache": None}),
        "model": cfg.model.model_copy(update={"weights": weights}),
    }
    return cfg.model_copy(update=changes)
