"""A configuration for the data at hand: every value with the reason for it, as a commented YAML file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import printable
from dnc_dist.config import parse_tree
from dnc_dist.data.images import DECODE_ERRORS
from dnc_dist.data.index import DatasetIndex, RowView
from dnc_dist.data.rows import ShardReader
from dnc_dist.engine.dataset import columns_of
from dnc_dist.retrieval.protocols import Protocol

# reader -> the k of recall@k that tables of its benchmark show.
RECALL_AT = {"cub200": [1, 2, 4, 8], "cars196": [1, 2, 4, 8], "sop": [1, 10, 100, 1000], "inshop": [1, 10, 20, 30, 40, 50]}
RECALL_AT |= {"vehicleid": [1, 5]}
BATCH, SMALL_BATCH = 80, 32
"""Rows of a published batch; and what was best where networks learn from scratch (docs/results.md, experiment i)."""
GROUPS_FROM = 4
"""Batches that the classes fill at least, for groups of close ones to be worth finding."""
SMALL_SIDE = 64
"""Pixels up to which a small network from scratch is the better start: pretrained ones know larger images."""
MOST_LEARNERS, MOST_FROM_SCRATCH = 32, 4
"""The published number with pretrained weights; and what was best in docs/results.md, where networks learn from scratch."""
IMAGES_OF_A_PASS = 3
HELD_OUT = 0.1
_LEAST_CLASSES_TO_HOLD_OUT = 50
_SAMPLED = 256


@dataclass(frozen=True)
class Facts:
    """What of a data set decides the values."""

    images: int
    classes: int
    usable: int
    """Training classes with at least two images: the others are in no pair."""
    per_class: float
    """Images of a class, the median."""
    side: int
    """Shorter side of the images in pixels, the median of a sample."""
    has_validation: bool
    protocol: str | None
    """Which suits the test split; None without one."""
    gallery: int
    """Images of the test split that are searched."""
    reader: str

    @property
    def held_out(self) -> int:
        """Classes to hold out for validation."""
        return 0 if self.has_validation or self.classes < _LEAST_CLASSES_TO_HOLD_OUT else round(HELD_OUT * self.classes)

    @property
    def trained(self) -> int:
        """Classes that batches are drawn from."""
        return self.usable - self.held_out


@dataclass(frozen=True)
class Value:
    """One key, its value, and why."""

    key: str
    value: Any
    why: str


def facts_of(index: DatasetIndex) -> Facts:
    """Look at a data set.

    Raises:
        InputError: it has no training split, fewer than two classes that can be trained on, or a test split that cannot be measured.
    """
    train = index.view("train")
    counts = np.bincount(train.labels)
    usable = int((counts >= 2).sum())
    if usable < 2:
        raise InputError(
            f"{index.root} has {usable} training class(es) with at least two images, and training needs two; prepare a set with more"
        )
    protocol, gallery = None, 0
    if "test" in index.splits:
        test = index.view("test")
        columns = columns_of(index, test)
        chosen: Protocol = parts.build("protocol", "auto").for_data(columns)
        protocol, gallery = chosen.name, int(test.gallery.sum())
    side = _median_side(index, train)
    return Facts(
        len(train),
        train.num_classes,
        usable,
        float(np.median(counts)),
        side,
        "validation" in index.splits,
        protocol,
        gallery,
        index.manifest.reader,
    )


def _median_side(index: DatasetIndex, view: RowView) -> int:
    """The median shorter side of images spread over the view; only their headers are read."""
    sides = []
    with closing(ShardReader(index)) as reader:
        for at in np.unique(np.linspace(0, len(view) - 1, _SAMPLED).astype(int)):
            data = reader.read(int(view.rows[at]))
            try:
                with Image.open(io.BytesIO(data)) as image:
                    sides.append(min(image.size))
            except DECODE_ERRORS:
                continue  # training passes over it, too, and reports it
    if not sides:
        raise InputError(f"no image of {index.root} can be decoded, of {_SAMPLED} that were tried; prepare the data set again")
    return int(np.median(sides))


def propose(root: Path, facts: Facts) -> dict[str, list[Value]]:
    """The sections of a configuration."""
    small = facts.side <= SMALL_SIDE
    samples = 4 if facts.per_class >= 4 else 2
    in_batch = min((SMALL_BATCH if small else BATCH) // samples, facts.trained)
    batch = in_batch * samples
    learners = 1
    while 2 * learners <= (MOST_FROM_SCRATCH if small else MOST_LEARNERS) and facts.trained >= 2 * learners * in_batch:
        learners *= 2
    steps = max(1, facts.images // batch)
    # The published 180 epochs on small sets; 40,000 steps are 55 epochs of 60,000 images, and 4,000 suit a small network.
    wanted, least, most = (4_000, 20, 60) if small else (40_000, 40, 180)
    epochs = min(max(round(wanted / steps), least), most)
    sections = {
        "data": list(_data(root, facts, small)),
        "model": list(_model(small)),
        "division": [_learners(facts, learners, in_batch), *(_groups(facts, in_batch) if small else [])],
        "schedule": [
            Value(
                "epochs",
                epochs,
                f"About {wanted:,} steps, but {least} epochs at least and {most} at most; an epoch has {steps:,} steps here.",
            ),
            Value("batch_size", batch, f"{in_batch} classes x {samples} images, over all processes together."),
            Value("samples_per_class", samples, f"A class has {facts.per_class:g} training images (median); fewer are taken as they are."),
            *([Value("decay", "cosine", "From scratch it helps to end with small steps.")] if small else []),
        ],
        "optim": list(_optim(small)),
        "evaluation": list(_evaluation(facts, epochs)),
    }
    if learners > 1:
        tree = {name: {value.key: value.value for value in values} for name, values in sections.items()}
        epoch = parse_tree(tree, "proposal").division.conquer_from
        why = f"Later the whole embedding is trained together: `auto` is epoch {epoch} with the values below; null: never."
        sections["division"].append(Value("conquer_from", "auto", why))
    if learners == 1 or small:
        why = "A network from scratch has no time to wait." if small else "The backbone only has to wait where learners change."
        sections["division"].append(Value("backbone_frozen_epochs", 0, why))
    return {name: values for name, values in sections.items() if values}


def _data(root: Path, facts: Facts, small: bool) -> Iterator[Value]:
    yield Value("root", str(root), "Where `dnc-dist data prepare` wrote the data set; from the folder in which you start.")
    if facts.protocol:
        yield Value("protocol", facts.protocol, "Who asks, and who is searched: what suits the roles in this data.")
    size = min(224, max(SMALL_SIDE, 32 * round(facts.side / 32))) if not small else max(16, 8 * round(facts.side / 8))
    known = "small images keep theirs" if small else "224 is what pretrained networks know best" if size == 224 else "about their size"
    yield Value("image_size", size, f"The shorter side of the images is {facts.side} pixels (median); {known}.")
    if small:
        yield Value("crop", 1.0, "Small images have no margin to cut off.")
        yield Value("augment", "light", "Strong crops leave little of a small image.")
    if not facts.has_validation:
        if facts.held_out:
            yield Value(
                "validation_classes",
                HELD_OUT,
                f"{facts.held_out:,} of {facts.classes:,} classes choose the best epoch; 0: train on all.",
            )
        else:
            yield Value("validation_classes", 0.0, f"{facts.classes} classes are too few to hold some out; the last epoch counts.")


def _model(small: bool) -> Iterator[Value]:
    if small:
        yield Value("backbone", "conv4", "Built in, for small images; it learns from scratch.")
        yield Value("weights", "none", "There are no pretrained weights of it.")
        yield Value("embedding_dim", 128, "Enough for a small network; a multiple of the number of learners.")
    else:
        yield Value("backbone", "resnet50", "Or any model of timm, such as vit_small_patch16_224.dino.")
        yield Value("weights", "pretrained", "Downloaded once; without a network give a file.")
        yield Value("embedding_dim", 512, "As published; smaller ones are searched faster.")


def _optim(small: bool) -> Iterator[Value]:
    if small:
        yield Value("lr", 1e-3, "A network that learns from scratch.")
        yield Value("mask_lr_mult", 10, "So masks learn at 0.01, as in configs/quickstart.yaml.")
    else:
        yield Value("lr", 1e-5, "As published with pretrained weights and a batch of 80; a higher one destroys what they know.")


def _learners(facts: Facts, learners: int, in_batch: int) -> Value:
    if learners == 1:
        return Value("num_learners", 1, f"{facts.trained} classes are too few to divide: one batch has {in_batch} of them.")
    return Value(
        "num_learners",
        learners,
        f"Each gets about {facts.trained // learners:,} of {facts.trained:,} classes; a batch has {in_batch} of one learner.",
    )


def _groups(facts: Facts, in_batch: int) -> Iterator[Value]:
    if facts.trained < GROUPS_FROM * in_batch:
        return
    yield Value("batches", "groups", "Classes that look alike share a batch; `learner`, as published, if many classes have two names.")
    if facts.per_class > IMAGES_OF_A_PASS:
        yield Value("images_per_class", IMAGES_OF_A_PASS, "As many images of a class tell which classes look alike.")


def _evaluation(facts: Facts, epochs: int) -> Iterator[Value]:
    if facts.protocol:
        usual = RECALL_AT.get(facts.reader, [1, 10, 100] if facts.gallery >= 10_000 else [1, 2, 4, 8])
        yield Value("recall_at", [k for k in usual if k == 1 or k < facts.gallery], f"{facts.gallery:,} test images are searched.")
        yield Value("at_start", True, "The untrained network is measured, too: what training adds is the difference.")
    if (every := max(1, epochs // 30)) > 1:
        yield Value("every", every, "Epochs between two evaluations, each of which embeds all test and validation images.")


def as_yaml(root: Path, facts: Facts, sections: dict[str, list[Value]]) -> str:
    """The commented file."""
    lines = [
        f"# For {facts.images:,} training images of {facts.classes:,} classes in {printable(str(root))}.",
        "# Every value may be changed, and what is not here has its default: `dnc-dist config --keys` explains all keys.",
    ]
    for name, values in sections.items():
        lines.append(f"{name}:")
        for value in values:
            lines += [f"  # {value.why}", f"  {value.key}: {json.dumps(value.value, ensure_ascii=False)}"]
    return "\n".join(lines) + "\n"
