"""The one object besides the DeepSpeed engine that a checkpoint holds. Everything else is derived from (config, state)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from dnc_dist.clustering.division import Division


@dataclass
class TrainState:
    """Where a run stands; equal on all ranks by construction."""

    epoch: int = 0
    """Epoch that is being trained (counted from 0)."""
    step: int = 0
    """Optimizer updates done."""
    batches_done: int = 0
    """Steps done in this epoch."""
    samples_seen: int = 0
    """Rows that went through a training step."""
    division: Division | None = None
    """The division in force; None before the first."""
    best: dict[str, Any] | None = None
    """{"epoch", "samples_seen", "metrics"} of the best evaluation so far on the split that selects; None if none selects."""
    baseline: dict[str, float] = field(default_factory=dict)
    """Retrieval metrics of the untrained network, if they were measured."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The newest evaluation."""
    tracker_run_id: str | None = None
    """W&B run that a resumed run continues."""
    config_digest: str = ""
    """`RunConfig.digest()` of the run."""
    data_hash: str = ""
    """Content hash of the dataset."""

    def finish_epoch(self) -> None:
        """Move on to the next epoch."""
        self.epoch += 1
        self.batches_done = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values and arrays, for a checkpoint."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["division"] = self.division.state_dict() if self.division is not None else None
        return values

    @classmethod
    def from_state_dict(cls, values: dict[str, Any]) -> TrainState:
        """The state that ``state_dict`` wrote."""
        division = values["division"]
        return cls(**{**values, "division": Division.from_state(division) if division is not None else None})
