"""What trackers that show a run elsewhere have in common: a thread, and what of the run's records has been shown."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, get_args

from dnc_dist.base import parts
from dnc_dist.processes.worker import skip_shutdown
from dnc_dist.rundir import METRICS_FILE
from dnc_dist.rundir.card import CARD
from dnc_dist.rundir.tracker import JsonlTracker, Kind, TrackedRun, Tracker, plain, read_metrics
from dnc_dist.trackers.panels import Panel

Line = dict[str, Any]
DEBUG = {
    "train": {
        "anchors_without_positives",
        "labels_beyond_beta",
        "negative_shortfall",
        "non_finite_rows",
        "positives_over_limit",
        "zero_rows",
    },
    "division": {"rejoined"},
    "evaluation": {"queries_left_out"},
    "epoch": {"left_over_images", "undecodable_images"},
}
"""Kind -> counts that are 0 unless something is unusual: they are shown apart, under ``debug/``."""
RETRIEVAL = ("map@r", "map", "r_precision", "nmi")
"""Beside recall@k, what is better the higher it is."""
CLOSE_SECONDS = 120.0
"""So long the end of a run waits for what is left to be sent: W&B gives itself 30 s to begin and 60 s to finish, and after a stop a
worker has 300 s for everything."""

_log = logging.getLogger(__name__)


class Best(NamedTuple):
    """The highest value of a metric, and how many epochs the network was trained for then."""

    value: float
    epoch: int


class BackgroundTracker(Tracker, ABC):
    """Base of trackers that show a run elsewhere, in a thread of their own: ``metrics.jsonl`` is written at once, the training waits for
    nothing else, its end not for ever, and whatever goes wrong is one warning.

    What is shown are the lines of ``metrics.jsonl``, in their order, and at the end the panels. A resume begins with the lines that are
    in the file: those that have been shown are passed over, those that a kill has kept from being shown are not.

    Derive from it with ``begin``, ``show_line``, ``show_panel``, ``show_end`` and ``end``, which the thread calls.
    """

    title = "the tracker"
    """Its name in warnings."""

    def __init__(self, options: parts.Options, *, run: TrackedRun, shown: Mapping[str, int] | None = None) -> None:
        """``shown``: what earlier processes of this run have shown: the last step of each kind, and names of panels."""
        super().__init__(options, run=run)
        self.run = run
        self.shown = dict(shown or {})
        self.best: dict[str, Best] = {}
        """By the name of the metric."""
        self.step = 0
        """Of the newest line."""
        self._doing = "starting it"
        self._jsonl = JsonlTracker(options, run=run)
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A daemon: nothing that it waits for may keep a process from ending.
        self._thread = Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    @abstractmethod
    def begin(self) -> None:
        """Open whatever it is. May take long."""

    @abstractmethod
    def show_line(self, line: Line) -> None:
        """Show a line of ``metrics.jsonl``."""

    @abstractmethod
    def show_panel(self, panel: Panel) -> None:
        """Show a panel, at ``self.step``, which is the last one of the run."""

    def show_end(self) -> None:
        """Show what is known at the end only, such as the report; called in every process that finds the run finished."""

    @abstractmethod
    def end(self) -> None:
        """Write everything out."""

    def remember(self, name: str, step: int) -> None:
        """Called before something is shown: after a kill it may be missing there, but nothing is there twice."""
        self.shown[name] = step

    def log(self, kind: Kind, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        line = {"step": step, "epoch": epoch, "kind": kind, **plain(values)}
        self._jsonl.log(kind, step, epoch, values)
        if self._thread.is_alive():
            self._tasks.put(partial(self._take, line))

    def finished(self) -> None:
        self._tasks.put(self._show_rest)

    def close(self) -> None:
        self._jsonl.close()
        self._tasks.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            newest = max(self.shown.get(kind, 0) for kind in get_args(Kind))
            _log.warning(
                "%s: %s takes longer than %.0f s, so it is given up; what %s has from step %d on, and what is shown at the end of a run, "
                "may be missing there",
                self.title,
                self._doing,
                CLOSE_SECONDS,
                METRICS_FILE,
                newest,
            )
            skip_shutdown()

    def _work(self) -> None:
        try:
            self.begin()
            self._doing = "logging"
            for line in read_metrics(self.run.folder / METRICS_FILE):
                self._take(line)
            while (task := self._tasks.get()) is not None:
                task()
            self._doing = "finishing"
            self.end()
        except Exception as error:  # whatever a library of others raises, it must never stop a training
            _log.warning("%s: %s failed (%s); the training goes on with %s alone", self.title, self._doing, first_line(error), METRICS_FILE)

    def _take(self, line: Line) -> None:
        """A line from the file or from the run; one that comes from both is shown once."""
        kind, step = line["kind"], line["step"]
        self.step = max(self.step, step)
        if kind == "evaluation" and step > 0:
            self._note_best(line)
        if step > self.shown.get(kind, -1):
            self.remember(kind, step)
            self.show_line(line)

    def _note_best(self, line: Line) -> None:
        for name, value in line.items():
            if is_retrieval(name) and isinstance(value, int | float) and not (name in self.best and self.best[name].value >= value):
                self.best[name] = Best(float(value), line["epoch"])

    def _show_rest(self) -> None:
        from dnc_dist.trackers.contents import panels_of  # it draws, and so takes a second to import

        for panel in panels_of(self.run.folder):
            mark = f"panel {panel.name}"
            if mark not in self.shown:
                self.remember(mark, self.step)
                self.show_panel(panel)
        self.show_end()


def is_retrieval(name: str) -> bool:
    """Whether the higher a value of this name, the better: recall@k and what is like it, of any list or split."""
    last = name.rpartition("/")[2]
    return (last.startswith("recall@") and not last.endswith("_std")) or last in RETRIEVAL


def shown_name(kind: str, name: str) -> str:
    """Under which name a value of a kind of lines is shown; what stands before the first slash is a section of the page."""
    debug = name.rpartition("/")[2] in DEBUG.get(kind, ())
    return f"debug/{kind}/{name}" if debug else f"{kind}/{name}"


def values_of(line: Line) -> Iterator[tuple[str, Any]]:
    """Name and value of all numbers and texts in a line: a list is shown as its entries, and a card not at all."""
    for name, value in line.items():
        if name not in ("step", "epoch", "kind") and name.rpartition("/")[2] != CARD:
            yield from _flat(shown_name(line["kind"], name), value)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    if isinstance(value, dict):
        for part, inner in value.items():
            yield from _flat(f"{name}/{part}", inner)
    elif value in ("NaN", "Infinity", "-Infinity"):
        yield name, float(value)
    else:
        yield name, value


def is_number(value: Any) -> bool:
    """Whether a curve can show a value."""
    return isinstance(value, int | float) and math.isfinite(value)


def first_line(error: Exception) -> str:
    """An error of a library, in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
