"""Training curves: ``metrics.jsonl`` always, W&B beside it if asked. Only rank 0 writes; the others get a tracker that does nothing.

Every line of ``metrics.jsonl`` is one JSON object with ``step``, ``epoch``, ``kind`` and the values of that kind. W&B is
an extra: whatever goes wrong with it is said once, in one line, and the training goes on with the file alone.
"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlparse

import numpy as np
from torch import Tensor

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError, RunError
from dnc_dist.base.files import replacing, write_text
from dnc_dist.base.foreign import JSON_OBJECT, parse_json, read_json, read_lines
from dnc_dist.processes import distributed
from dnc_dist.rundir import METRICS_FILE
from dnc_dist.rundir.card import CARD

Kind = Literal["train", "division", "evaluation", "epoch"]

INIT_SECONDS = 30.0
"""W&B's server has so long to answer when a run begins."""
_WANDB_MARKS_FILE = "wandb_steps.json"

_log = logging.getLogger(__name__)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: tensors and arrays become numbers (this waits for the device); NaN and infinities their names."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
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

    def __init__(self, options: parts.Options, *, run: TrackedRun) -> None:
        self.run_id = run.id

    def log(self, kind: Kind, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        """Record values (numbers, 0-d tensors, lists of them) of one kind at a step; tensors are read from the device here."""

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
        line = (json.dumps({"step": step, "epoch": epoch, "kind": kind, **_plain(values)}) + "\n").encode()
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


def _wandb_mode(base_url: str) -> Literal["online", "offline", "disabled", "shared"]:
    """WANDB_MODE if set; else online if a key for the server is in the environment or in netrc; else offline."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]  # type: ignore[return-value]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        found = path.exists() and netrc.netrc(path).authenticators(urlparse(base_url).hostname or "")
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as error:
        _log.warning("W&B: %s cannot be read (%s); the run is logged offline", path, _first_line(error))
        return "offline"
    return "online" if found else "offline"


def wandb_route() -> str:
    """How W&B would log a run that starts now: online, offline, disabled or shared."""
    import wandb

    return _wandb_mode(wandb.Settings().base_url)


def _flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        return {name: value}
    return {key: item for part, inner in value.items() for key, item in _flat(f"{name}/{part}", inner).items()}


class WandbTracker(Tracker):
    """`metrics.jsonl` and a W&B run of the same id, offline unless an API key is there.

    W&B failing in any way costs one warning, never the training.

    W&B cannot take steps back. What it was given before a resume is kept in ``wandb_steps.json`` as the last step of
    each kind, over any number of resumes, and is not sent again.
    """

    def __init__(self, options: parts.Options, *, run: TrackedRun) -> None:
        marks_path = run.folder / _WANDB_MARKS_FILE
        self._marks: dict[str, int] = {}
        if run.resume_step is not None:
            if marks_path.exists():
                cure = "delete it; W&B may then get a step twice"
                self._marks = read_json(marks_path, dict[str, int], cure)
            if (run.folder / METRICS_FILE).exists():
                for line in read_metrics(run.folder / METRICS_FILE):
                    self._marks[line["kind"]] = max(line["step"], self._marks.get(line["kind"], -1))
            write_text(marks_path, json.dumps(self._marks) + "\n")
        elif marks_path.exists():
            marks_path.unlink()
        super().__init__(options, run=run)
        self._jsonl = JsonlTracker(options, run=run)
        self._run: Any = None
        try:
            self._run = self._start(run)
        except Exception as error:  # W&B must never stop a training, whatever it raises
            self._give_up("starting it failed", error)

    def _start(self, tracked: TrackedRun) -> Any:
        import wandb

        wanted = {"init_timeout": INIT_SECONDS, "finish_timeout": 60.0, "quiet": True, "silent": True, "console": "off"}
        settings = wandb.Settings(**{name: value for name, value in wanted.items() if name in wandb.Settings.model_fields})
        mode = _wandb_mode(settings.base_url)
        common: dict[str, Any] = {"project": tracked.project, "name": tracked.name, "id": self.run_id, "resume": "allow"}
        common |= {"dir": str(tracked.folder), "config": dict(tracked.config), "settings": settings}
        try:
            run = wandb.init(**common, mode=mode)
        except Exception as error:
            if mode == "offline":
                raise
            _log.warning("W&B cannot be reached (%s); this run is logged offline, `wandb sync` sends it later", _first_line(error))
            wandb.teardown()  # its service would go on saying that the run's id is in use
            run = wandb.init(**common, mode="offline")
        run.define_metric("*", step_metric="step")
        return run

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        _log.warning("W&B: %s (%s); the training goes on with %s alone", what, _first_line(error), METRICS_FILE)

    def log(self, kind: Kind, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        values = _plain(values)
        self._jsonl.log(kind, step, epoch, values)
        if self._run is None or step <= self._marks.get(kind, -1):
            return
        record = {"step": step, "epoch": epoch}
        cards: dict[str, Any] = {}
        for name, value in values.items():
            if name.rpartition("/")[2] == CARD:
                cards[f"{kind}/{name}"] = value
                continue
            record |= _flat(f"{kind}/{name}", value)
        # An event that W&B has not seen, at a step that it has, goes to the next one; the curves use our own "step".
        first_free = max(self._marks.values(), default=-1) + 1
        try:
            self._run.log(record, step=max(step, first_free))
            # What numbers stand on is no curve.
            self._run.summary.update(cards)
        except Exception as error:
            self._give_up("logging failed", error)

    def close(self) -> None:
        self._jsonl.close()
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._give_up("finishing failed", error)
            self._run = None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__


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
