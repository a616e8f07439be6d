"""What a run has left behind, read for the report: ``metrics.jsonl``, ``config.yaml``, ``gallery.npz``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dnc_dist.errors import InputError
from dnc_dist.gallery import Gallery, load_gallery
from dnc_dist.tracker import METRICS_FILE, read_metrics

Line = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Series:
    """One quantity over the epochs: x (n,) in epochs, y (n,)."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)


def number(value: Any) -> float | None:
    """A logged value as a number (NaN and infinities are logged by name); None if it is not one."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A run's lines, configuration and gallery; every part may be missing or incomplete."""

    path: Path
    lines: list[Line]
    config: dict[str, Any]
    gallery: Gallery | None
    epoch_ends: np.ndarray  # (n, 2) step, epochs done: where x axes have their whole numbers

    def of(self, kind: str) -> list[Line]:
        """The lines of one kind."""
        return [line for line in self.lines if line["kind"] == kind]

    def position(self, step: int) -> float:
        """A step as a position in epochs."""
        return float(np.interp(step, self.epoch_ends[:, 0], self.epoch_ends[:, 1]))

    def series(self, kind: str, name: str) -> Series:
        """The finite values of one name, over the epochs."""
        points = [(self.position(line["step"]), value) for line in self.of(kind) if (value := number(line.get(name))) is not None]
        array = np.array([point for point in points if np.isfinite(point[1])], dtype=float).reshape(-1, 2)
        return Series(array[:, 0], array[:, 1])

    def names(self, kind: str, prefix: str = "") -> list[str]:
        """All names with a prefix that lines of a kind have, numbers in numeric order."""
        found = {name for line in self.of(kind) for name in line if name.startswith(prefix)}
        return sorted(
            found,
            key=lambda name: (not name[len(prefix) :].isdigit(), int(name[len(prefix) :]) if name[len(prefix) :].isdigit() else 0, name),
        )

    def setting(self, dotted: str) -> Any:
        """A value of the configuration, such as ``division.every``; None if it is not there."""
        value: Any = self.config
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def conquer_from(self) -> float | None:
        """The epoch from which the whole embedding was trained; None if it never was."""
        start = number(self.setting("division.conquer_from"))
        return start if start is not None and start < float(self.epoch_ends[-1, 1]) else None

    @property
    def selected_on(self) -> str:
        """What picked the best checkpoint: last, validation or test."""
        chosen = str(self.setting("evaluation.select_on") or "auto")
        if chosen != "auto":
            return chosen
        return "validation" if self.names("evaluation", "validation/") else "last"

    def result(self) -> Line:
        """The final metrics: those of the evaluation that the selection picked, or of the last one; empty without any."""
        evaluations = [line for line in self.of("evaluation") if "recall@1" in line]
        if not evaluations:
            return {}
        key = {"validation": "validation/recall@1", "test": "recall@1"}.get(self.selected_on)
        if key is None:
            return evaluations[-1]
        return max(evaluations, key=lambda line: number(line.get(key)) or 0.0)


def _epoch_ends(lines: list[Line]) -> np.ndarray:
    """From the last step of every epoch. Division lines stand at the end of the epoch before, evaluations after their own."""
    last: dict[int, int] = {}
    for line in lines:
        if line["kind"] in ("train", "epoch"):
            last[line["epoch"]] = max(line["step"], last.get(line["epoch"], 0))
    ends = [(0, 0)] + [(step, epoch + 1) for epoch, step in sorted(last.items()) if step > 0]
    return np.array(ends, dtype=float)


def read_run(run_dir: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        InputError: it is none, or nothing has been logged yet, or a file of it is damaged.
    """
    metrics = run_dir / METRICS_FILE
    if not run_dir.is_dir():
        raise InputError(f"{run_dir} is no directory; give the directory of a run, the one with {METRICS_FILE} in it")
    if not metrics.exists():
        raise InputError(f"{run_dir} is not the directory of a run: it has no {METRICS_FILE}; train one with `dnc-dist launch CONFIG`")
    lines = read_metrics(metrics)
    if not lines:
        raise InputError(f"{metrics} has no line yet; wait for the first training step to be logged")
    config_path = run_dir / "config.yaml"
    try:
        config = yaml.safe_load(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
    except yaml.YAMLError as error:
        raise InputError(f"{config_path} is damaged; delete it, `dnc-dist report` works without") from error
    return RunRecord(run_dir, lines, config if isinstance(config, dict) else {}, load_gallery(run_dir), _epoch_ends(lines))
