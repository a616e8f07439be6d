"""A model alone in a folder: weights, configuration, a card; loadable as the run itself is, with equal embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import safetensors.torch

from dnc_dist.base.errors import InputError
from dnc_dist.base.files import is_part_of, replacing, write_text
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
        InputError: the folder holds something else, or the packages for ONNX are not installed.
        RunError: the ONNX model computes something else than this one.
    """
    if onnx:
        check_packages()
    if out.is_dir():
        if other := sorted(path.name for path in out.iterdir() if not _ours(path)):
            raise InputError(f"--out {out} holds {other[0]}, which no export has; give a new folder, or one that was exported into before")
    elif out.exists():
        raise InputError(f"--out {out} is a file; give a folder")
    graph, difference = onnx_bytes(model) if onnx else (None, None)
    out.mkdir(parents=True, exist_ok=True)
    for path in out.iterdir():
        path.unlink()
    if graph is not None:
        with replacing(out / ONNX_FILE) as file:
            file.write(graph)
        tell(f"{out / ONNX_FILE}: largest difference from torch in a coordinate {difference:.1e}")
    write_text(out / CONFIG_FILE, dump_config(_without_places(model.cfg)))
    write_text(out / CARD_FILE, card(model, difference))
    weights = {name: value.detach().cpu().contiguous() for name, value in model.network.state_dict().items()}
    # Last: a folder that has them is whole.
    with replacing(out / WEIGHTS_FILE) as file:
        file.write(safetensors.torch.save(weights, {METADATA: json.dumps(asdict(model.origin))}))


def _ours(path: Path) -> bool:
    return path.is_file() and (path.name in _FILES or any(is_part_of(path, name) for name in _FILES))


def _without_places(cfg: RunConfig) -> RunConfig:
    """The configuration without the folders of the machine that the model was trained on."""
    weights = cfg.model.weights if cfg.model.weights in ("none", "pretrained") else Path(cfg.model.weights).name
    changes = {
        "run": cfg.run.model_copy(update={"dir": Path("runs")}),
        "data": cfg.data.model_copy(update={"root": Path(Path(cfg.data.root).name)}),
        "model": cfg.model.model_copy(update={"weights": weights}),
    }
    return cfg.model_copy(update=changes)
