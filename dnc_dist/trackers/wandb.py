"""W&B: the same run after every resume, offline unless an API key is there."""

from __future__ import annotations

import json
import logging
import netrc
import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import numpy as np

from dnc_dist.base import parts
from dnc_dist.base.files import write_text
from dnc_dist.base.foreign import read_json
from dnc_dist.base.settings import dotted
from dnc_dist.rundir import CONFIG_FILE, REPORT_FILE
from dnc_dist.rundir.card import CARD
from dnc_dist.rundir.record import read_run
from dnc_dist.rundir.tracker import TrackedRun
from dnc_dist.trackers.background import BackgroundTracker, Line, first_line, is_retrieval, values_of
from dnc_dist.trackers.panels import Histogram, Panel, Picture, Scatter, Table

INIT_SECONDS = 30.0
"""W&B's server has so long to answer when a run begins."""
FLUSH_SECONDS = 1.0
"""After a kill, what was logged so long before is on the disk."""
_MARKS_FILE = "wandb_steps.json"
_ROWS = "rows"
"""Among the marks: how many rows W&B has been given."""
_TAGS = {"model.backbone.name": "backbone", "loss.name": "loss", "division.num_learners": "learners", "run.seed": "seed"}
_LONGEST_TAG = 64
_DATA_DIR = "WANDB_DATA_DIR"

_log = logging.getLogger(__name__)


class WandbTracker(BackgroundTracker):
    """`metrics.jsonl` and a W&B run of the same id, offline unless an API key is there.

    W&B takes rows in the order of their numbers, and none back. So rows are numbered one after the other, over any number of resumes, and
    curves are drawn over ``step``, which is among the values of each row. ``wandb_steps.json`` keeps what has been given to W&B.
    """

    title = "W&B"

    def __init__(self, options: parts.Options, *, run: TrackedRun) -> None:
        self._marks_path = run.folder / _MARKS_FILE
        marks: dict[str, int] = {}
        if run.resume_step is None:
            self._marks_path.unlink(missing_ok=True)
        elif self._marks_path.exists():
            marks = read_json(self._marks_path, dict[str, int], "delete it; W&B may then get a step twice")
        marks.setdefault(_ROWS, max(marks.values(), default=-1) + 1)
        self._run: Any = None
        super().__init__(options, run=run, shown=marks)

    def begin(self) -> None:
        import wandb

        self._wandb: Any = wandb
        if not os.environ.get(_DATA_DIR):
            # The images of tables wait there to be sent: with the run, not in somebody's home.
            os.environ[_DATA_DIR] = str(self.run.folder.absolute() / "wandb")
        settings = _settings(wandb)
        mode = _mode(settings.base_url)
        seed, name = self.run.config.get("run", {}).get("seed"), self.run.name
        common: dict[str, Any] = {"project": self.run.project, "name": name, "id": self.run_id, "resume": "allow"}
        common |= {"dir": str(self.run.folder), "config": dict(self.run.config), "settings": settings}
        if not os.environ.get("WANDB_RUN_GROUP"):
            # `launch --repeat` calls its runs so.
            common["group"] = name.removesuffix(f"-seed{seed}")
        if not os.environ.get("WANDB_TAGS"):
            common["tags"] = tags_of(self.run)
        try:
            self._run = wandb.init(**common, mode=mode)
        except Exception as error:
            if mode == "offline":
                raise
            _log.warning("W&B cannot be reached (%s); this run is logged offline, `wandb sync` sends it later", first_line(error))
            wandb.teardown()  # its service would go on saying that the run's id is in use
            self._run = wandb.init(**common, mode="offline")
        self._run.define_metric("*", step_metric="step")
        # A server may know of rows that a run of an earlier version has sent.
        self.shown[_ROWS] = max(self.shown[_ROWS], int(getattr(self._run, "step", 0) or 0))

    def remember(self, name: str, step: int) -> None:
        super().remember(name, step)
        self.shown[_ROWS] += 1
        write_text(self._marks_path, json.dumps(self.shown) + "\n")

    def show_line(self, line: Line) -> None:
        values = dict(values_of(line))
        if line["kind"] == "division" and isinstance(line.get("sizes"), list):
            values["division/cluster_sizes"] = self._wandb.Histogram(np.asarray(line["sizes"], float).tolist(), num_bins=16)
        self._row(line["step"], line["epoch"], values)
        cards = {f"{line['kind']}/{name}": value for name, value in line.items() if name.rpartition("/")[2] == CARD}
        # What numbers stand on is no curve.
        if cards:
            self._run.summary.update(cards)
        if line["kind"] == "evaluation":
            self._run.summary.update(self._best())

    def _best(self) -> dict[str, Any]:
        """Not W&B's own maximum: that one forgets what was before a resume."""
        values: dict[str, Any] = {f"best/{name}": one.value for name, one in self.best.items()}
        return values | {f"best/{name}_epoch": one.epoch for name, one in self.best.items()}

    def _row(self, step: int, epoch: int | None, values: dict[str, Any]) -> None:
        place = {"step": step} if epoch is None else {"step": step, "epoch": epoch}
        self._run.log(place | values, step=self.shown[_ROWS] - 1, commit=True)

    def show_panel(self, panel: Panel) -> None:
        wandb = self._wandb
        match panel:
            case Picture(name, image, caption):
                shown = wandb.Image(image, caption=caption)
            case Histogram(name, counts, edges, _):
                shown = wandb.Histogram(np_histogram=(counts, edges))
            case Table(name, columns, rows, _):
                cells = [[wandb.Image(cell) if isinstance(cell, np.ndarray) else cell for cell in row] for row in rows]
                shown = wandb.Table(columns=columns, data=cells)
            case Scatter(name, points, classes, right, _):
                rows = [[*point, *rest] for point, *rest in zip(points.tolist(), classes, right.tolist(), strict=True)]
                table = wandb.Table(columns=["x", "y", "class", "nearest is right"], data=rows)
                shown = wandb.plot.scatter(table, "x", "y", title="Map of the test embedding")
        self._row(self.step, None, {name: shown})

    def show_end(self) -> None:
        folder, wandb = self.run.folder, self._wandb
        record = read_run(folder, with_gallery=False)
        chosen = {f"result/{name}": value for name, value in record.result().items() if is_retrieval(name)}
        self._run.summary.update(self._best() | chosen | {"result/selected_on": record.selected_on})
        if "report" in self.shown:
            return
        self.remember("report", record.last_step)
        artifact = wandb.Artifact(f"run-{self.run_id}-report", "report", description="The report of the run, and its configuration")
        for name in (REPORT_FILE, CONFIG_FILE):
            if (folder / name).exists():
                artifact.add_file(str(folder / name), name=name, skip_cache=True)
        self._run.log_artifact(artifact)

    def end(self) -> None:
        self._run.finish()


def _settings(wandb: Any) -> Any:
    wanted = {"init_timeout": INIT_SECONDS, "finish_timeout": 60.0, "quiet": True, "silent": True, "console": "off"}
    wanted["x_transaction_log_flush_interval"] = FLUSH_SECONDS
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in wandb.Settings.model_fields})


def tags_of(run: TrackedRun) -> list[str]:
    """What one looks for among many runs: data set, backbone, loss, learners, seed."""
    settings = dict(dotted(run.config))
    # A part without options of its own stands there by its name alone.
    settings |= {f"{key}.name": value for key, value in settings.items() if key == "model.backbone"}
    tags = [f"{name}: {settings[key]}" for key, name in _TAGS.items() if key in settings]
    if root := settings.get("data.root"):
        tags.insert(0, f"data: {Path(str(root).rstrip('/')).name}")
    return [tag[:_LONGEST_TAG] for tag in tags]


def _mode(base_url: str) -> Literal["online", "offline", "disabled", "shared"]:
    """WANDB_MODE if set; else online if a key for the server is in the environment or in netrc; else offline."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]  # type: ignore[return-value]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        found = path.exists() and netrc.netrc(path).authenticators(urlparse(base_url).hostname or "")
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as error:
        _log.warning("W&B: %s cannot be read (%s); the run is logged offline", path, first_line(error))
        return "offline"
    return "online" if found else "offline"


def wandb_route() -> str:
    """How W&B would log a run that starts now: online, offline, disabled or shared."""
    import wandb

    return _mode(wandb.Settings().base_url)
