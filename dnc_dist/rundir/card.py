"""The card of a result: what a number stands on. Numbers may be compared where their cards are equal but for seed, code and epoch."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dnc_dist.base.foreign import parse_json

CARD = "card"
"""Under this name it stands beside the metrics: in the evaluations of ``metrics.jsonl`` and in ``dnc-dist evaluate --json``."""
DISTANCE = "euclidean, normalised embeddings"
_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Card:
    """What the metrics of one evaluation stand on."""

    protocol: str
    parameters: dict[str, Any]
    """What the protocol was given: the k of recall@k, its own options, and which of its lists the metrics without a prefix are of."""
    split: str
    data_hash: str
    """Hash of every image, label, split and role, from the data set's manifest."""
    num_queries: int
    num_gallery: int
    num_classes: int
    queries_left_out: int
    """Queries without a gallery image of their class."""
    distance: str
    dimension: int
    """Width of the embeddings that were compared."""
    selected_on: str
    """What chose the weights: last, validation or test."""
    seed: int
    """Of the training."""
    version: str
    """Of dnc-dist."""
    commit: str | None
    """Of the checkout that dnc-dist ran from; None if it was installed."""
    epoch: int
    """Epochs that the weights were trained for."""
    checkpoint: str | None
    """Which holds the weights; None for an untrained network."""

    def plain(self) -> dict[str, Any]:
        """The card as JSON has it."""
        return asdict(self)

    @classmethod
    def of(cls, values: Any, source: str | Path) -> Card:
        """The card that gave these ``plain`` values.

        Raises:
            InputError: they are none, with the source's name.
        """
        return parse_json(json.dumps(values), cls, f"{source}: {CARD}")


@cache
def commit() -> str | None:
    """Commit of the checkout that this package is run from, with ``-dirty`` if files differ from it; None outside of a checkout."""
    git = ["git", "-C", str(_PACKAGE)]
    # Without optional locks git writes nothing into the checkout.
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "env": os.environ | {"GIT_OPTIONAL_LOCKS": "0"}}
    try:
        # An installed package may lie in the checkout of something else.
        place = subprocess.run([*git, "rev-parse", "--show-prefix"], **options)
        if place.stdout.strip() != f"{_PACKAGE.name}/":
            return None
        found = subprocess.run([*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], **options)
    except OSError:  # no git here, so nobody knows
        return None
    return found.stdout.strip() or None
