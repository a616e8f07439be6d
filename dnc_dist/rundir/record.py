"""What a run has left behind, read for the report: ``metrics.jsonl``, ``config.yaml``, pictures; from any hand, of any length."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dnc_dist.base.errors import InputError
from dnc_dist.base.yaml_text import read_yaml
from dnc_dist.rundir import CONFIG_FILE, METRICS_FILE
from dnc_dist.rundir.card import CARD, Card
from dnc_dist.rundir.diagnosis import Diagnosis, load_diagnosis
from dnc_dist.rundir.gallery import PictureGallery, load_gallery
from dnc_dist.rundir.maps import EmbeddingMap, load_maps
from dnc_dist.rundir.tracker import metric_lines

Line = dict[str, Any]
MOST_MAPS = 8
POINTS = 2048
"""A curve has between so many points and twice as many, or as many as were logged if those are fewer."""
_KINDS = ("train", "division", "evaluation", "epoch")
_NAME = re.compile(r"[A-Za-z0-9_@./+-]{1,64}")
_MOST_NAMES = 2000
_MOST_SIZES = 4096
# Beyond it numbers are as good as infinite; what draws curves cannot take them.
_LARGEST = 1e30
# Lines about epochs are kept whole; 30,000 epochs have not as many bytes.
_MOST_EPOCH_BYTES = 1 << 26


@dataclass(frozen=True, eq=False)
class Series:
    """One quantity over the epochs: x (n,) in epochs, y (n,)."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)


class Thinned:
    """The points (step, value) of one name in bounded memory: once they are many, means over 2, 4, 8, ... that follow each other."""

    __slots__ = ("_count", "_run", "_steps", "_sum_step", "_sum_value", "_values")

    def __init__(self) -> None:
        self._steps: list[float] = []
        self._values: list[float] = []
        self._run, self._count, self._sum_step, self._sum_value = 1, 0, 0.0, 0.0

    def add(self, step: int, value: float) -> None:
        """The next point."""
        self._sum_step += step
        self._sum_value += value
        self._count += 1
        if self._count == self._run:
            self._steps.append(self._sum_step / self._run)
            self._values.append(self._sum_value / self._run)
            self._count, self._sum_step, self._sum_value = 0, 0.0, 0.0
            if len(self._steps) == 2 * POINTS:
                for points in (self._steps, self._values):
                    points[:] = [(left + right) / 2 for left, right in zip(points[::2], points[1::2], strict=True)]
                self._run *= 2

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps (n,) and values (n,)."""
        rest = [(self._sum_step / self._count, self._sum_value / self._count)] if self._count else []
        table = np.array([*zip(self._steps, self._values, strict=True), *rest], dtype=float).reshape(-1, 2)
        return table[:, 0], table[:, 1]


SELECTED_PREFIX = {"validation": "validation/", "test": ""}
"""What selects the best evaluation -> how the names of its metrics begin; where nothing does, the last one counts."""


def standing(metrics: Mapping[str, Any], prefix: str) -> tuple[float, float]:
    """recall@1, then map@r of an evaluation: the best has the highest. With a few validation classes recall@1 soon stays at 1.

    Args:
        metrics: values by name; what is no number counts as 0.
        prefix: of the names of the split that selects.
    """
    return number(metrics.get(f"{prefix}recall@1")) or 0.0, number(metrics.get(f"{prefix}map@r")) or 0.0


def number(value: Any) -> float | None:
    """A logged value as a finite number; None if it is none (NaN and infinities are logged by name)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -_LARGEST <= value <= _LARGEST else None


@dataclass(eq=False)
class RunRecord:
    """A run's lines, configuration and gallery; every part may be missing or incomplete."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    gallery: PictureGallery | None = None
    diagnosis: Diagnosis | None = None
    maps: dict[int, EmbeddingMap] = field(default_factory=dict)
    """By step: those of up to seven evaluations before that of the diagnosis."""
    damaged_maps: list[str] = field(default_factory=list)
    lines: dict[str, list[Line]] = field(default_factory=lambda: {kind: [] for kind in _KINDS})
    """Those about epochs, by kind; of training steps only the curves are kept."""
    curves: dict[str, dict[str, Thinned]] = field(default_factory=lambda: {kind: {} for kind in _KINDS})
    last_step: int = 0
    passed_over: int = 0
    """Complete lines that are none of ours."""
    epoch_ends: np.ndarray = field(default_factory=lambda: np.zeros((1, 2)))  # (n, 2) step, epochs done: the x axes' whole numbers

    def of(self, kind: str) -> list[Line]:
        """The lines of one kind (none of "train")."""
        return self.lines[kind]

    def position(self, steps: float | np.ndarray) -> Any:
        """Steps as positions in epochs."""
        return np.interp(steps, self.epoch_ends[:, 0], self.epoch_ends[:, 1])

    def series(self, kind: str, name: str) -> Series:
        """The finite values of one name, over the epochs."""
        steps, values = self.curves[kind].get(name, Thinned()).points()
        return Series(self.position(steps), values)

    def names(self, kind: str, prefix: str = "") -> list[str]:
        """All names of numbers with a prefix that lines of a kind have, in numeric order."""
        found = [name for name in self.curves[kind] if name.startswith(prefix)]
        tails = {name: name[len(prefix) :] for name in found}
        return sorted(found, key=lambda name: (not tails[name].isdecimal(), int(tails[name]) if tails[name].isdecimal() else 0, name))

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

    def card(self) -> Card | None:
        """What the numbers of ``result`` stand on; None where nothing was measured, or by a version that wrote no cards.

        Raises:
            InputError: what stands there is no card.
        """
        values = self.result().get(CARD)
        return None if values is None else Card.of(values, self.path / METRICS_FILE)

    def result(self) -> Line:
        """The final metrics: those of the evaluation that the selection picked, or of the last one; empty without any.

        The untrained network is no candidate; it counts while nothing else was measured.
        """
        measured = [line for line in self.of("evaluation") if "recall@1" in line]
        evaluations = [line for line in measured if line["step"] > 0] or measured
        if not evaluations:
            return {}
        prefix = SELECTED_PREFIX.get(self.selected_on)
        return evaluations[-1] if prefix is None else max(evaluations, key=lambda line: standing(line, prefix))


def _read_metrics(path: Path, run: RunRecord) -> None:
    """Fill in lines, curves and the ends of the epochs, in one pass that keeps few lines."""
    # The last step of every epoch. Division lines stand at the end of the epoch before, evaluations after their own.
    last: dict[int, int] = {}
    kept = 0
    for text, line in metric_lines(path):
        if line is None:
            run.passed_over += 1
            continue
        kind, step = line["kind"], line["step"]
        if kind not in run.curves:
            continue
        run.last_step = max(step, run.last_step)
        if kind in ("train", "epoch"):
            last[line["epoch"]] = max(step, last.get(line["epoch"], 0))
        curves = run.curves[kind]
        for name, value in line.items():
            found = number(value)
            if found is None:
                continue
            if name not in curves:
                if len(curves) == _MOST_NAMES or not _NAME.fullmatch(name):
                    continue
                curves[name] = Thinned()
            curves[name].add(step, found)
        if kind != "train":
            kept += len(text)
            if kept > _MOST_EPOCH_BYTES:
                raise InputError(f"{path} has more lines about epochs than any run ({_MOST_EPOCH_BYTES >> 20} MB); it is damaged")
            if not _are_sizes(line.get("sizes")):
                line.pop("sizes", None)
            run.lines[kind].append(line)
    ends = [(0, 0)] + [(step, epoch + 1) for epoch, step in sorted(last.items()) if step > 0]
    run.epoch_ends = np.maximum.accumulate(np.array(ends, dtype=float))


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, list) or not 0 < len(value) <= _MOST_SIZES:
        return False
    return all(type(size) is int and 0 <= size < 1 << 53 for size in value)


def read_run(run_dir: Path, *, with_gallery: bool = True) -> RunRecord:
    """Read a run directory, with or without its pictures.

    Raises:
        InputError: it is none, or nothing has been logged yet, or a file of it is damaged.
    """
    metrics = run_dir / METRICS_FILE
    if not run_dir.is_dir():
        raise InputError(f"{run_dir} is no directory; give the directory of a run, the one with {METRICS_FILE} in it")
    if not metrics.exists():
        raise InputError(f"{run_dir} is not the directory of a run: it has no {METRICS_FILE}; train one with `dnc-dist launch CONFIG`")
    run = RunRecord(run_dir)
    _read_metrics(metrics, run)
    if not any(run.curves.values()):
        more = f" ({run.passed_over:,} lines are none of a run)" if run.passed_over else ""
        raise InputError(f"{metrics} has no line yet{more}; leave it out, or wait for the first training step to be logged")
    config_path = run_dir / CONFIG_FILE
    if config_path.exists():
        try:
            config = read_yaml(config_path)
        except InputError as error:
            cure = "delete it, `dnc-dist report` works without" if with_gallery else "put the right one back"
            raise InputError(f"{error}; {cure}") from error
        run.config = config if isinstance(config, dict) else {}
    if with_gallery:
        run.gallery, run.diagnosis = load_gallery(run_dir), load_diagnosis(run_dir)
        if run.diagnosis is not None:
            # A map whose evaluation is not in the log is of a past that the run went back behind.
            last = int(run.diagnosis.map_step[0])
            steps = [line["step"] for line in run.of("evaluation") if line["step"] < last]
            run.maps, run.damaged_maps = load_maps(run_dir, steps, MOST_MAPS - 1, before=last)
    return run
