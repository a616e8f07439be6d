"""Training curves: ``metrics.jsonl`` always, and what ``dnc_dist.trackers`` shows of it elsewhere.

Only rank 0 writes; the others get a tracker that does nothing. Every line of ``metrics.jsonl`` is one JSON object with ``step``,
``epoch``, ``kind`` and the values of that kind.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError, RunError
from dnc_dist.base.files import replacing
from dnc_dist.base.foreign import JSON_OBJECT, parse_json, read_lines
from dnc_dist.processes import distributed
from dnc_dist.rundir import METRICS_FILE

Kind = Literal["train", "division", "evaluation", "epoch"]


def plain(value: Any) -> Any:
    """A value as JSON can hold it: tensors and arrays become numbers (this waits for the device); NaN and infinities their names."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"  # float() and pandas read them back
    return value


def metric_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The complete lines of a ``metrics.jsonl`` of any length, one by one, and what they say; None for lines that no run writes.

    What they say has an integer ``step`` and ``epoch`` and a text ``kind``; the other values are whatever JSON has.

    Raises:
        InputError: the file cannot be read.
    """
    for text in read_lines(path):
        try:
            line = parse_json(text, JSON_OBJECT, path)
        except InputError:
            yield text, None
            continue
        step, epoch, kind = line.get("step"), line.get("epoch"), line.get("kind")
        ours = type(step) is int and 0 <= step < 1 << 53 and type(epoch) is int and 0 <= epoch < 1 << 31 and type(kind) is str
        yield text, line if ours else None


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """What the lines of a ``metrics.jsonl`` say; lines that no run writes, and one half-written by a killed process, are passed over."""
    return (line for _, line in metric_lines(path) if line is not None)


class TrackedRun(NamedTuple):
    """What a tracker is told of its run. ``resume_step``: of the checkpoint that is resumed; None: a run from its start."""

    folder: Path
    id: str
    resume_step: int | None
    project: str
    name: str
    config: Mapping[str, Any]


class Tracker:
    """Base of trackers, which rank 0 logs to, and (this class itself) what every other rank logs to: nothing."""

    class Options(parts.Options):
        """Default, range and meaning of every option."""

    @classmethod
    def check(cls) -> None:
        """Called before the run directory is made. Raises InputError if something that the tracker needs is not there."""

    def __init__(self, options: parts.Options, *, run: TrackedRun) -> None:
        self.run_id = run.id

    def log(self, kind: Kind, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        """Record values (numbers, 0-d tensors, lists of them) of one kind at a step; tensors are read from the device here."""

    def finished(self) -> None:
        """The run is trained to its end, and its directory has everything: pictures, diagnosis, report. ``close`` follows."""

    def close(self) -> None:
        """Write everything out."""


class JsonlTracker(Tracker):
    """`metrics.jsonl` alone: a line at a time, each flushed."""

    def __init__(self, options: parts.Options, *, run: TrackedRun) -> None:
        super().__init__(options, run=run)
        run.folder.mkdir(parents=True, exist_ok=True)
        self._path = run.folder / METRICS_FILE
        # A division or evaluation made right at the checkpoint is made again after the resume: it is the same one.
        self._already = _cut(self._path, -1 if run.resume_step is None else run.resume_step)
        self._file = self._path.open("ab", buffering=0)

    def log(self, kind: Kind, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        if (kind, step) in self._already:
            return
        line = (json.dumps({"step": step, "epoch": epoch, "kind": kind, **plain(values)}) + "\n").encode()
        try:
            while line:  # a disk that becomes full takes a part
                line = line[self._file.write(line) :]
        except OSError as error:
            raise RunError(
                f"{self._path} cannot be written ({error.strerror}); the checkpoints are whole, and `--resume auto` goes on later"
            ) from error

    def close(self) -> None:
        self._file.close()


def _cut(path: Path, step: int) -> set[tuple[str, int]]:
    """Take the lines after a step from ``metrics.jsonl``; kind and step of those that stand right at it."""
    at_step = set()
    with replacing(path) as file:
        for text, line in metric_lines(path) if path.exists() else ():
            if line is not None and line["step"] <= step:
                file.write(text)
                if line["step"] == step:
                    at_step.add((line["kind"], step))
    return at_step


def check_tracker(chosen: parts.Named | str) -> None:
    """Raise InputError if the tracker lacks something that it needs."""
    parts.load("tracker", parts.name_of_chosen(chosen)).check()


def build_tracker(
    chosen: parts.Named | str,
    run_dir: Path,
    *,
    project: str,
    run_name: str,
    config: Mapping[str, Any],
    run_id: str | None = None,
    resume_step: int | None = None,
) -> Tracker:
    """Collective. The tracker of this rank; its ``run_id`` is the same on all of them and belongs into the checkpoint.

    Args:
        chosen: which one, and its options.
        run_id: of the run that is resumed; None: a new one.
        resume_step: step of the checkpoint that is resumed; lines of later steps are cut from ``metrics.jsonl``. None: a
            run from its start, of whose earlier attempts nothing is kept.
    """
    run_id = distributed.broadcast_object(run_id or secrets.token_hex(4))
    run = TrackedRun(Path(run_dir), run_id, resume_step, project, run_name, config)
    if not distributed.is_main():
        return Tracker(Tracker.Options(), run=run)
    tracker: Tracker = parts.build("tracker", chosen, run=run)
    return tracker
