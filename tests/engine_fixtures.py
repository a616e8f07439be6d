"""What the tests of the engine share: tiny real datasets, configurations, divisions made by hand, and outcomes that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dnc_dist.base.progress import Progress
from dnc_dist.clustering.division import Division
from dnc_dist.config import RunConfig, parse_tree
from dnc_dist.data.index import open_index
from dnc_dist.data.readers import read
from dnc_dist.data.shards import write_shards
from dnc_dist.doctor.harness import Outcome, errors_of
from dnc_dist.processes import distributed

SIZE, CLASSES, PER_CLASS = 16, 12, 6
# Fewer test classes, and so shards, than ranks: one of four ranks has nothing to embed.
TEST_CLASSES = 3


def make_dataset(place: Path) -> Path:
    """A prepared dataset of noisy patterns: 12 x 6 training and 3 x 6 test images of 16 pixels."""
    generator = np.random.default_rng(5)
    for split, classes in (("train", CLASSES), ("test", TEST_CLASSES)):
        for label in range(classes):
            pattern = generator.uniform(40, 215, (4, 4, 3)).repeat(4, 0).repeat(4, 1)
            for number in range(PER_CLASS):
                path = place / "pictures" / split / f"{split}{label:02d}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = pattern + generator.normal(0, 50, pattern.shape)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    write_shards(read("folder", place / "pictures"), place / "data")
    return place / "data"


def damage(root: Path, place: Path, train: Sequence[int], test: Sequence[int] = ()) -> Path:
    """A copy of a dataset in which these places of the views hold bytes that are no image; sizes are unchanged."""
    index = open_index(root)
    broken = [int(index.view(name).rows[at]) for name, places in (("train", train), ("test", test)) for at in places]
    place.mkdir(parents=True)
    for path in root.iterdir():
        (place / path.name).symlink_to(path)
    for row in broken:
        copy = place / index.shard_paths[index.columns["shard"][row]].name
        content = bytearray(copy.read_bytes())
        start, size = (int(index.columns[name][row]) for name in ("offset", "size"))
        content[start : start + size] = b"x" * size
        copy.unlink()
        copy.write_bytes(content)
    return place


def config(root: Path, run: Path, /, **changes: dict[str, Any]) -> RunConfig:
    """A configuration of the tiny network without anything random; ``changes`` are keys by section."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run.parent), "name": run.name, "seed": 3},
        "data": {"root": str(root), "image_size": SIZE, "crop": 1.0, "augment": "none", "workers": 0},
        "model": {"backbone": "conv4", "weights": "none", "embedding_dim": 16, "batch_norm": "global", "dropout": 0.0},
        "loss": {"name": "margin"},
        "division": {"num_learners": 4, "every": 1, "backbone_frozen_epochs": 0, "mask_penalty": 0.3},
        "schedule": {"epochs": 1, "batch_size": 24, "samples_per_class": 3},
        "optim": {"lr": 0.001},
        "evaluation": {"batch_size": 7},
        "tracker": {"kind": "jsonl", "log_every": 1},
    }
    for section, values in changes.items():
        tree[section] = tree[section] | values if section in tree else values
    return parse_tree(tree, "test")


def division_by_hand(labels: NDArray[np.int64], level: int, only: int | None = None) -> Division:
    """Learner c % level takes the rows of class c; ``only`` 2 or 3: two rows of its first class and one of the next."""
    learner = labels % level
    if only is not None:
        for a in range(level):
            places = np.flatnonzero(learner == a)
            learner[np.setdiff1d(places, places[[0, 1, PER_CLASS][:only]])] = -1
    sizes = np.bincount(learner[learner >= 0], minlength=level)
    return Division(learner.astype(np.int16), level, np.empty((level, 0), np.float32), 0, sizes, int((learner < 0).sum()))


def kept(path: Path) -> Outcome:
    """The outcome that ``against_one`` left."""
    return Outcome(*torch.load(path))


def against_one(found: Outcome, path: Path) -> dict[str, float]:
    """Errors relative to the outcome of one process, which leaves it at ``path``."""
    if distributed.world_size() == 1:
        torch.save(tuple(found), path)
    return errors_of(found, kept(path))


def silent() -> Progress:
    """Progress that writes nothing."""
    return Progress(False)
