"""metrics.jsonl survives kills and resumes, and full disks."""

from __future__ import annotations

import io
import json
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dnc_dist.base.errors import RunError
from dnc_dist.rundir.tracker import Tracker, build_tracker, read_metrics
from tests.spawn import spawn


def _build(run_dir: Path, kind: Any = "jsonl", run_id: str | None = None, resume_step: int | None = None) -> Tracker:
    return build_tracker(kind, run_dir, project="test", run_name="run", config={"a": {"b": 1}}, run_id=run_id, resume_step=resume_step)


def _steps(run_dir: Path) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in read_metrics(run_dir / "metrics.jsonl")]


def test_values_become_json(tmp_path: Path) -> None:
    tracker = _build(tmp_path)
    values = {
        "loss": torch.tensor(1.5),
        "sizes": torch.arange(3),
        "share": np.float32(0.5),
        "nan": float("nan"),
        "inf": torch.tensor(-torch.inf),
    }
    tracker.log("train", 3, 1, values)
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    expected = {"step": 3, "epoch": 1, "kind": "train", "loss": 1.5, "sizes": [0, 1, 2], "share": 0.5, "nan": "NaN", "inf": "-Infinity"}
    assert line == expected and float(line["inf"]) == -float("inf")
    tracker.close()


def test_resume_cuts_at_the_checkpoint_and_drops_a_half_written_line(tmp_path: Path) -> None:
    tracker = _build(tmp_path)
    for step in range(1, 7):
        tracker.log("train", step, 0, {"loss": step})
    tracker.log("evaluation", 4, 0, {"recall@1": 0.5})
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "epoch": 0, "ki')
    resumed = _build(tmp_path, run_id=tracker.run_id, resume_step=4)
    assert resumed.run_id == tracker.run_id
    kept = [("train", step) for step in (1, 2, 3, 4)] + [("evaluation", 4)]
    assert _steps(tmp_path) == kept
    resumed.log("evaluation", 4, 0, {"recall@1": 0.5})  # made again right after the checkpoint
    resumed.log("train", 5, 0, {"loss": 5})
    resumed.close()
    assert _steps(tmp_path) == [*kept, ("train", 5)]
    assert all(text.endswith("}") for text in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_a_run_from_its_start_keeps_nothing_of_a_killed_attempt(tmp_path: Path) -> None:
    _build(tmp_path).log("train", 1, 0, {"loss": 1.0})
    _build(tmp_path).log("train", 1, 0, {"loss": 2.0})
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2.0]


def _log_on_every_rank(run_dir: str) -> tuple[str, str]:
    tracker = _build(Path(run_dir))
    tracker.log("train", 1, 0, {"loss": 1.0})
    tracker.close()
    return tracker.run_id, type(tracker).__name__


def test_only_rank_0_writes_and_all_know_the_run(tmp_path: Path) -> None:
    (id_0, kind_0), (id_1, kind_1) = spawn(_log_on_every_rank, 2, str(tmp_path))
    assert id_0 == id_1 and (kind_0, kind_1) == ("JsonlTracker", "Tracker")
    assert _steps(tmp_path) == [("train", 1)]


def test_a_resume_passes_over_lines_that_no_run_writes(tmp_path: Path) -> None:
    lines = ['{"step": 1, "epoch": 0, "kind": "train", "loss": 1e-7}', "[]", '{"step": "2", "epoch": 0, "kind": "train"}', "\x00"]
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in [*lines, lines[0].replace("1,", "3,", 1)]))
    _build(tmp_path, run_id="x", resume_step=2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == lines[0] + "\n", "what is kept is kept as it is written"


@contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _log_on_a_full_disk(run_dir: str) -> tuple[str, int]:
    tracker = _build(Path(run_dir))
    tracker.log("train", 1, 0, {"loss": 1.0})
    size = (Path(run_dir) / "metrics.jsonl").stat().st_size
    with _files_of_at_most(size + 9), pytest.raises(RunError) as caught:
        tracker.log("train", 2, 0, {"loss": 2.0})
    tracker.close()
    return str(caught.value), size


def test_a_full_disk_is_one_message_and_a_resume_goes_on(tmp_path: Path) -> None:
    ((message, size),) = spawn(_log_on_a_full_disk, 1, str(tmp_path))
    assert message == (
        f"{tmp_path}/metrics.jsonl cannot be written (File too large); the checkpoints are whole, and `--resume auto` goes on later"
    )
    assert (tmp_path / "metrics.jsonl").stat().st_size == size + 9
    _build(tmp_path, run_id="x", resume_step=1).close()
    assert _steps(tmp_path) == [("train", 1)] and (tmp_path / "metrics.jsonl").stat().st_size == size


def _log_to_a_full_disk(run_dir: str) -> list[str]:
    from dnc_dist.rundir.log import close_log, open_log

    with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()) as out:
        open_log(Path(run_dir))
        log = logging.getLogger("dnc_dist")
        log.info("caf\udce9")
        with _files_of_at_most((Path(run_dir) / "log.txt").stat().st_size + 5):
            for number in range(3):
                log.warning("line %d", number)
            close_log()
    return [err.getvalue(), *out.getvalue().encode(errors="backslashreplace").decode().splitlines()]


def test_a_full_disk_for_the_log_costs_the_log_alone(tmp_path: Path) -> None:
    ((err, *out),) = spawn(_log_to_a_full_disk, 1, str(tmp_path))
    assert err == "" and r"caf\udce9" in (tmp_path / "log.txt").read_text()
    assert sorted(out) == sorted(
        [
            r"caf\udce9",
            *(f"line {n}" for n in range(3)),
            f"{tmp_path}/log.txt cannot be written (File too large); the run goes on without it",
        ]
    )
