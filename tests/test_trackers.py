"""Trackers that show a run elsewhere: everything once, in order, over kills and resumes; and nothing of theirs can stop a training."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dnc_dist.base.errors import InputError
from dnc_dist.base.files import write_text
from dnc_dist.engine.trainer import Trainer
from dnc_dist.processes.signals import StopRequest
from dnc_dist.rundir.diagnosis import save_diagnosis
from dnc_dist.rundir.gallery import PictureGallery, save_gallery
from dnc_dist.rundir.tracker import Tracker, build_tracker, read_metrics
from dnc_dist.trackers import background
from dnc_dist.trackers import wandb as wandb_tracker
from dnc_dist.trackers.background import BackgroundTracker, values_of
from dnc_dist.trackers.contents import panels_of
from dnc_dist.trackers.panels import Histogram, Picture, Scatter, Table
from tests import engine_fixtures
from tests.diagnosis_fixtures import make_diagnosis
from tests.process_server import SERVER
from tests.run_fixtures import dnc, make_dataset, signalled_in, without_report, write_config
from tests.wandb_records import OfflineRun, read_finished_run, read_offline_runs

PANELS = [
    "neighbours/sheet",
    "neighbours/queries",
    "mistakes/distance_right",
    "mistakes/distance_wrong",
    "mistakes/queries",
    "mistakes/confusions",
    "learners/masks",
    "learners/clusters",
    "map/embedding",
]


@pytest.fixture(autouse=True)
def _no_wandb_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_DATA_DIR", "WANDB_RUN_GROUP", "WANDB_TAGS"):
        # Set and deleted: so what a tracker puts there is gone after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def _build(run_dir: Path, kind: Any, run_id: str | None = None, resume_step: int | None = None) -> Tracker:
    config = {"run": {"seed": 7}, "model": {"backbone": {"name": "conv4"}}, "data": {"root": "data/birds"}, "optim": {"lr": 0.01}}
    return build_tracker(kind, run_dir, project="test", run_name="birds-seed7", config=config, run_id=run_id, resume_step=resume_step)


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("dnc_dist") and record.levelno >= logging.WARNING]


def _lines(run_dir: Path) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in read_metrics(run_dir / "metrics.jsonl")]


def _leave_pictures(run_dir: Path) -> None:
    """What the last evaluation of a run leaves."""
    labels, near = np.arange(4), np.array([[0, 1, -1], [2, 1, 3], [2, 2, 0], [1, 3, 3]])
    side = np.random.default_rng(1).integers(0, 255, (4, 3, 16, 16, 3), dtype=np.uint8)
    names = {0: "red", 1: "green", 2: "u0041", 3: "blue"}
    save_gallery(run_dir, PictureGallery(labels, near, labels, near, np.full((4, 3), 0.5, np.float32), names, side[:, 0], side))
    save_diagnosis(run_dir, make_diagnosis())
    write_text(run_dir / "report.html", "<!doctype html>\n")
    write_text(run_dir / "config.yaml", "evaluation: {select_on: last}\n")


def _log_a_run(tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.log("train", step, (step - 1) // 4, {"loss": 1 / step, "zero_rows": 0.0, "learner_loss/0": float("nan")})
        if step % 4 == 0:
            epoch = step // 4
            tracker.log("evaluation", step, epoch, {"recall@1": 0.9 - 0.1 * epoch, "protocol": "leave-one-out", "card": {"seed": 7}})
            tracker.log("epoch", step, epoch - 1, {"seconds": 1.0, "undecodable_images": 0})
            tracker.log("division", step, epoch, {"sizes": [30, 10, 20], "rejoined": 0})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_run_in_wandb_stopped_in_mid_epoch_and_resumed(tmp_path: Path) -> None:
    """Stopped in its second epoch, resumed, and started once more when it was finished: one W&B run that has everything once."""
    make_dataset(tmp_path)
    sections: dict[str, Any] = {"division": {"num_learners": 2, "conquer_from": 2}, "schedule": {"epochs": 3}}
    write_config(tmp_path, Path("data"), tracker={"kind": "wandb"}, evaluation={"at_start": True}, **sections)
    command = ["train", "run.yaml", "--set", "run.name=mine-seed0"]
    run = tmp_path / "runs/mine-seed0"
    stopped = dnc(*command, folder=tmp_path, before=partial(signalled_in, "train_epoch", 8, signal.SIGTERM))
    assert stopped.code == 75 and 8 < max(step for _, step in _lines(run)) < 16
    for before in (None, without_report):
        done = dnc(*command, folder=tmp_path, before=before)
        assert done.out.splitlines()[-1].startswith("RESULT ") and "W&B" not in done.out, done.out

    shown = read_finished_run(run)
    assert len(shown.files) == 3 and len(shown.ids) == 1 and shown.groups == {"mine"}
    assert shown.tags == {("data: data", "backbone: conv4", "loss: margin", "learners: 2", "seed: 0")}
    assert shown.steps == sorted(set(shown.steps)), "W&B takes no row back"
    assert shown.kinds() == _lines(run)
    for line, row in zip(read_metrics(run / "metrics.jsonl"), shown.rows, strict=False):
        assert row["step"] == line["step"] and row["epoch"] == line["epoch"]
        for name, value in values_of(line):
            assert row[name] == value or value is None
    assert _panels(shown) == PANELS
    assert_files_of_panels(shown)
    recalls = {line["epoch"]: line["recall@1"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "evaluation"}
    best = max(value for epoch, value in recalls.items() if epoch > 0)
    assert shown.summary["best/recall@1"] == best and recalls[shown.summary["best/recall@1_epoch"]] == best
    assert shown.summary["result/recall@1"] == recalls[3] and shown.summary["result/selected_on"] == "last"
    reports = [artifact for artifact in shown.artifacts if artifact.type == "report"]
    assert [[entry.path for entry in one.manifest.contents] for one in reports] == [["config.yaml", "report.html"]]


def _panels(shown: OfflineRun) -> list[str]:
    """Names of the panels in their order; the table that a chart is drawn from counts as the chart."""
    sections = {name.partition("/")[0] for name in PANELS}
    found = [name for row in shown.rows for name in row if name.partition("/")[0] in sections]
    return [name.removesuffix("_table") for name in found]


def assert_files_of_panels(shown: OfflineRun) -> None:
    """Every picture and table that a row names is there."""
    values = [value for row in shown.rows for value in row.values() if isinstance(value, dict) and "path" in value]
    assert len(values) == 7 and {value["path"] for value in values} <= shown.media
    tables = [artifact for artifact in shown.artifacts if artifact.type == "run_table"]
    held = [entry for artifact in tables for entry in artifact.manifest.contents]
    assert sum(entry.path.endswith(".table.json") for entry in held) == 5
    assert all(Path(entry.local_path).is_file() for entry in held if entry.local_path)


def _log_and_be_killed(folder: str) -> None:
    tracker = _build(Path(folder), "wandb", "abcd1234")
    _log_a_run(tracker, range(1, 7))
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_kill_has_kept_from_wandb_is_shown_by_the_resume(tmp_path: Path) -> None:
    killed = SERVER.Process(target=_log_and_be_killed, args=(str(tmp_path),))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    first = _lines(tmp_path)
    assert ("evaluation", 4) in first and read_offline_runs(tmp_path).kinds() == [], "it was killed before W&B had begun"
    resumed = _build(tmp_path, "wandb", "abcd1234", resume_step=4)
    _log_a_run(resumed, range(5, 9))
    _leave_pictures(tmp_path)
    resumed.finished()
    resumed.close()
    shown = read_finished_run(tmp_path)
    assert shown.kinds() == _lines(tmp_path) and len(set(shown.kinds())) == 8 + 3 * 2
    assert _panels(shown) == PANELS
    assert shown.groups == {"birds"} and shown.tags == {("data: birds", "backbone: conv4", "seed: 7")}
    assert shown.summary["best/recall@1"] == pytest.approx(0.8) and shown.summary["best/recall@1_epoch"] == 1
    assert shown.summary["result/recall@1"] == pytest.approx(0.7)
    assert shown.summary["evaluation/card"] == {"seed": 7}
    by_step = [row for row in shown.rows if "train/loss" in row]
    assert all(row["debug/train/zero_rows"] == 0 and "train/zero_rows" not in row for row in by_step)
    histogram = next(row["division/cluster_sizes"] for row in shown.rows if "division/sizes/0" in row)
    assert histogram["_type"] == "histogram" and sum(histogram["values"]) == 3
    distances = next(row["mistakes/distance_right"] for row in shown.rows if "mistakes/distance_right" in row)
    assert distances["values"] == make_diagnosis().distance_counts[0].tolist()


class _BrokenRun:
    step = 0

    def define_metric(self, name: str, step_metric: str) -> None: ...

    def log(self, record: dict[str, Any], step: int, commit: bool) -> None:
        raise BrokenPipeError("the service is gone")

    def finish(self) -> None:
        raise RuntimeError("never called: the run was given up")


@pytest.mark.parametrize("where", ["init", "log"])
def test_a_broken_wandb_stops_nothing_and_is_said_once(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    import wandb

    def init(**kwargs: object) -> _BrokenRun:
        if where == "init":
            raise wandb.errors.CommError("no service\nlong story")
        return _BrokenRun()

    monkeypatch.setattr(wandb, "init", init)
    tracker = _build(tmp_path, "wandb")
    for step in (1, 2):
        tracker.log("train", step, 0, {"loss": 1.0})
    tracker.close()
    assert _lines(tmp_path) == [("train", 1), ("train", 2)]
    messages = _said(caplog)
    assert len(messages) == 1 and "goes on with metrics.jsonl alone" in messages[0] and "\n" not in messages[0]


def test_an_unreachable_server_means_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    import wandb

    modes: list[str] = []

    def init(**kwargs: Any) -> Any:
        modes.append(kwargs["mode"])
        if kwargs["mode"] == "online":
            raise wandb.errors.CommError("dial tcp: no such host")
        return _BrokenRun()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    monkeypatch.setattr(_BrokenRun, "finish", lambda self: None)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    _build(tmp_path, "wandb").close()
    assert modes == ["online", "offline"]
    assert len(_said(caplog)) == 1 and "wandb sync" in _said(caplog)[0]


def test_the_training_does_not_wait_for_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not answer: lines are written while W&B begins."""
    import wandb

    answer = threading.Event()

    def init(**kwargs: Any) -> _BrokenRun:
        assert answer.wait(60)
        raise wandb.errors.CommError("no answer")

    monkeypatch.setattr(wandb, "init", init)
    tracker = _build(tmp_path, "wandb")
    tracker.log("train", 1, 0, {"loss": 1.0})
    assert _lines(tmp_path) == [("train", 1)] and not answer.is_set()
    answer.set()
    tracker.close()


def test_the_end_does_not_wait_for_a_wandb_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    import wandb

    hangs, released = threading.Event(), threading.Event()
    skipped: list[bool] = []

    def log(self: _BrokenRun, values: dict[str, Any], **_: Any) -> None:
        if values["step"] == 3:
            hangs.set()
            released.wait(60)

    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(background, "skip_shutdown", lambda: skipped.append(True))
    monkeypatch.setattr(_BrokenRun, "log", log)
    monkeypatch.setattr(_BrokenRun, "finish", lambda self: None)
    monkeypatch.setattr(wandb, "init", lambda **_: _BrokenRun())
    tracker = _build(tmp_path, "wandb")
    assert isinstance(tracker, BackgroundTracker)
    for step in range(1, 6):
        tracker.log("train", step, 0, {"loss": 1.0})
    assert hangs.wait(60)
    started = time.monotonic()
    tracker.close()
    try:
        assert time.monotonic() - started < 30 and skipped
        (said,) = _said(caplog)
        assert said.startswith("W&B: logging takes longer than 0 s") and "metrics.jsonl has from step 3 on" in said, said
        assert _lines(tmp_path) == [("train", step) for step in range(1, 6)]
    finally:
        released.set()
        tracker._thread.join(30)


def test_mode_follows_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://api.wandb.example"
    assert wandb_tracker._mode(url) == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.example login user password secret\n")
    assert wandb_tracker._mode(url) == "online"
    assert wandb_tracker._mode("https://elsewhere.example") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_tracker._mode(url) == "disabled"


@pytest.mark.parametrize("content", ["machine", "\xff"])
def test_a_malformed_netrc_means_offline(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "netrc").write_text(content, encoding="latin-1")
    assert wandb_tracker._mode("https://api.wandb.example") == "offline"
    assert len(_said(caplog)) == 1 and f"{tmp_path}/netrc cannot be read" in _said(caplog)[0]


@pytest.mark.parametrize("content", ["[]", '{"train": "x"}', "{", "\x00", '{"train": 1e9}'])
def test_odd_marks_of_wandb_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "wandb_steps.json").write_text(content)
    with pytest.raises(InputError, match=r"wandb_steps\.json is damaged: .*; delete it; W&B may then get a step twice"):
        _build(tmp_path, "wandb", "x", resume_step=1)


def test_tensorboard_has_everything_once_after_a_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Read back by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = _build(tmp_path, "tensorboard")
    _log_a_run(first, range(1, 7))
    first.close()
    resumed = _build(tmp_path, "tensorboard", first.run_id, resume_step=4)
    _log_a_run(resumed, range(5, 9))
    _leave_pictures(tmp_path)
    resumed.finished()
    resumed.close()
    assert not _said(caplog)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 9))
    assert [event.value for event in losses] == pytest.approx([1 / step for step in range(1, 9)])
    assert [event.step for event in events.Scalars("evaluation/recall@1")] == [4, 8]
    assert "debug/train/zero_rows" in events.Tags()["scalars"] and "train/zero_rows" not in events.Tags()["scalars"]
    assert [event.value for event in events.Scalars("best/recall@1")] == pytest.approx([0.8])
    sizes = events.Histograms("division/cluster_sizes")
    assert [event.step for event in sizes] == [4, 8] and sizes[0].histogram_value.num == 3
    for panel in panels_of(tmp_path):
        if isinstance(panel, Histogram):
            (event,) = events.Histograms(panel.name)
            assert event.histogram_value.num == panel.counts.sum()
        else:
            (event,) = events.Images(panel.name)
            assert event.height > 30 and event.width > 60
            if isinstance(panel, Picture):
                assert (event.height, event.width) == panel.image.shape[:2]
        assert event.step == 8
    (settings,) = [tag for tag in events.summary_metadata if tag.endswith("session_start_info")]
    assert b"model.backbone.name" in events.summary_metadata[settings].plugin_data.content


def test_tensorboard_that_is_not_installed_is_named_before_there_is_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    cfg = engine_fixtures.config(engine_fixtures.make_dataset(tmp_path), tmp_path / "run", tracker={"kind": "tensorboard"})
    with pytest.raises(InputError, match=r"needs the package tensorboard.*pip install 'dnc-dist\[tensorboard\]', or set tracker\.kind to"):
        Trainer(cfg, "never", StopRequest())
    assert not (tmp_path / "run").exists()


def test_the_tracker_on_the_page_of_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs/tracking.md").read_text()
    (code,) = re.findall(r"```python\n(# my_tracker.py\n.*?)```", page, re.DOTALL)
    (tmp_path / "my_tracker.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    chosen = {"name": "my_tracker:TextTracker", "value": "train/loss"}
    first = _build(tmp_path / "run", chosen)
    _log_a_run(first, range(1, 4))
    first.close()
    resumed = _build(tmp_path / "run", chosen, first.run_id, resume_step=2)
    _log_a_run(resumed, range(3, 5))
    _leave_pictures(tmp_path / "run")
    resumed.finished()
    resumed.close()
    lines = (tmp_path / "run/curve.txt").read_text().splitlines()
    assert lines[:4] == ["1 1.0", "2 0.5", f"3 {1 / 3}", "4 0.25"]
    assert [line.split(":")[0] for line in lines[4:]] == [f"panel {name}" for name in PANELS]


def test_panels_of_a_run(tmp_path: Path) -> None:
    assert list(panels_of(tmp_path)) == []
    _leave_pictures(tmp_path)
    panels = {panel.name: panel for panel in panels_of(tmp_path)}
    assert list(panels) == PANELS
    found = make_diagnosis()
    table = panels["mistakes/confusions"]
    assert isinstance(table, Table)
    assert [row[2:6] for row in table.rows] == [[12, 0.15, 5, 0.0625], [3, 0.0375, 0, 0.0]]
    assert table.rows[0][6].shape[1] == 4 * 16 + 2 + 12 + 2, "two examples of two pictures"
    for table in (panel for panel in panels.values() if isinstance(panel, Table)):
        assert {len(row) for row in table.rows} == {len(table.columns)} and len(table.columns) == len(set(table.columns))
    queries = panels["mistakes/queries"]
    assert isinstance(queries, Table) and [row[0] for row in queries.rows].count("worst query") == len(found.worst)
    assert queries.rows[0][8:] == [None] * 4, "the gallery has none of its class"
    masks = panels["learners/masks"]
    assert isinstance(masks, Picture) and "of the embedding" in masks.caption and "Mean cosine" in masks.caption
    points = panels["map/embedding"]
    assert isinstance(points, Scatter) and len(points.points) == len(points.classes)


def test_a_run_that_was_never_divided_has_no_masks(tmp_path: Path) -> None:
    save_diagnosis(tmp_path, make_diagnosis(learners=0))
    assert [panel.name for panel in panels_of(tmp_path)] == [name for name in PANELS[2:] if not name.startswith("learners")]


@pytest.mark.parametrize("name", ["gallery.npz", "diagnosis.npz"])
def test_damaged_pictures_cost_a_warning(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = _build(tmp_path, "tensorboard")
    tracker.log("train", 1, 0, {"loss": 1.0})
    (tmp_path / name).write_bytes(b"PK")
    tracker.finished()
    tracker.close()
    assert len(_said(caplog)) == 1 and "is damaged" in _said(caplog)[0]
