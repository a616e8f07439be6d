"""The one object besides the DeepSpeed engine that a checkpoint holds. Everything else is derived from (config, state)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import parse_json
from dnc_dist.clustering.division import Division

MOST_STEPS = 10**8 - 1
"""The names of checkpoints have eight digits."""
Metrics = dict[str, float | int | str | None]


class Best(TypedDict):
    """The evaluation that was chosen: the epoch after which it stood, and what it measured."""

    epoch: int
    samples_seen: int
    metrics: Metrics


@dataclass
class _Plain:
    """What of a train state can be written as JSON."""

    epoch: int = 0
    """Epoch that is being trained (counted from 0)."""
    step: int = 0
    """Optimizer updates done."""
    batches_done: int = 0
    """Steps done in this epoch."""
    samples_seen: int = 0
    """Rows that went through a training step."""
    best: Best | None = None
    """The best evaluation so far on the split that selects; None if none selects."""
    baseline: Metrics = field(default_factory=dict)
    """Retrieval metrics of the untrained network, if they were measured."""
    metrics: Metrics = field(default_factory=dict)
    """The newest evaluation."""
    tracker_run_id: str | None = None
    """W&B run that a resumed run continues."""
    config_digest: str = ""
    """`RunConfig.digest()` of the run."""
    data_hash: str = ""
    """Content hash of the dataset."""
    layout_hash: str = ""
    """Hash of its images and shards; a run that streams is planned by these."""


@dataclass
class TrainState(_Plain):
    """Where a run stands; equal on all ranks by construction."""

    division: Division | None = None
    """The division in force; None before the first."""

    def finish_epoch(self) -> None:
        """Move on to the next epoch."""
        self.epoch += 1
        self.batches_done = 0

    def state_dict(self) -> dict[str, Any]:
        """JSON, and beside it the division's arrays, for a checkpoint."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(_Plain)}
        return {"json": json.dumps(values), "division": self.division.state_dict() if self.division is not None else None}

    @classmethod
    def from_state_dict(cls, values: Any, source: str | Path = "train state") -> TrainState:
        """The state that ``state_dict`` wrote.

        Raises:
            InputError: it is none, with the source's name.
        """
        if not isinstance(values, dict) or values.keys() != {"json", "division"} or not isinstance(values["json"], str):
            raise InputError(f"{source} is damaged: it holds no train state of this version")
        plain, division = parse_json(values["json"], _Plain, source), values["division"]
        if min(plain.epoch, plain.step, plain.batches_done, plain.samples_seen) < 0 or plain.step > MOST_STEPS:
            raise InputError(f"{source} is damaged: it counts {plain.step} steps and {plain.samples_seen} samples in epoch {plain.epoch}")
        return cls(**vars(plain), division=Division.from_state(division, source) if division is not None else None)
