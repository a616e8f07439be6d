"""A terminal that is closed ends no training: a hangup makes it save and stop, and under ``nohup`` it goes on unheard."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.run_fixtures import (
    Done,
    Running,
    assert_same_run,
    dnc,
    last_step,
    make_dataset,
    metrics,
    start,
    wait_until,
    without_report,
    write_config,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and a configuration; it has a loader process, which a hangup reaches, too."""
    folder = tmp_path_factory.mktemp("terminal")
    write_config(folder, make_dataset(folder), data={"workers": 1}, schedule={"epochs": 6}, evaluation={"every": 6})
    return folder


def on_terminal(name: str, ignore_hangup: bool) -> None:
    """For ``before``: the terminal of this name is the process's own, and all its standard streams."""
    without_report()
    terminal = os.open(name, os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for number in range(3):
        os.dup2(terminal, number)
    os.close(terminal)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    if ignore_hangup:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def on_closed_terminal(place: Path, *arguments: str, nohup: bool) -> Running:
    """A command line whose terminal is closed in the midst of its training."""
    master, slave = pty.openpty()
    shown = bytearray()
    running = start(arguments, place, before=partial(on_terminal, os.ttyname(slave), nohup))
    run = place / "runs" / arguments[-1].removeprefix("run.name=")

    def trained() -> bool:
        # A terminal that nobody reads makes its writers wait once it is full.
        while select.select([master], [], [], 0)[0]:
            shown.extend(os.read(master, 1 << 16))
        return last_step(run) >= 4 or not running.alive()

    try:
        wait_until(trained)
        assert running.alive(), shown.decode()
    finally:
        os.close(slave)
        os.close(master)
    return running


@pytest.mark.slow
def test_a_closed_terminal_saves_and_stops(place: Path) -> None:
    def train(name: str) -> list[str]:
        return ["train", "run.yaml", "--set", f"run.name={name}"]

    dnc(*train("whole"), folder=place, before=without_report)
    assert on_closed_terminal(place, *train("closed"), nohup=False).wait().code == 75
    assert last_step(place / "runs" / "closed") < last_step(place / "runs" / "whole")
    assert dnc(*train("closed"), folder=place, before=without_report).code == 0
    assert_same_run(place / "runs" / "closed", place / "runs" / "whole")


@pytest.mark.slow
def test_a_launch_whose_terminal_is_closed_saves_and_stops(place: Path) -> None:
    arguments = ["launch", "run.yaml", "--nproc", "2", "--set", "run.name=launched"]
    assert on_closed_terminal(place, *arguments, nohup=False).wait().code == 75
    assert (place / "runs" / "launched" / "checkpoints" / "latest").exists()


@pytest.mark.parametrize(
    "command",
    [["train", "run.yaml"], pytest.param(["launch", "run.yaml", "--nproc", "2"], marks=pytest.mark.slow)],
    ids=["train", "launch"],
)
def test_under_nohup_it_goes_on_unheard(place: Path, command: list[str]) -> None:
    name = f"nohup-{command[0]}"
    assert on_closed_terminal(place, *command, "--set", f"run.name={name}", nohup=True).wait().code == 0
    assert metrics(place / "runs" / name, "evaluation")[-1]["epoch"] == 6


def on_a_full_disk() -> None:
    """For ``before``: standard output and error go where nothing can be written."""
    without_report()
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)


def without_standard_output() -> None:
    """For ``before``: the process was started without standard output and error."""
    without_report()
    sys.stdout = sys.stderr = None  # type: ignore[assignment]
    os.close(1)
    os.close(2)


@pytest.mark.parametrize("before", [on_a_full_disk, without_standard_output])
def test_a_training_needs_no_reader(place: Path, before: Callable[[], None]) -> None:
    changes = ["schedule.epochs=2", "division.conquer_from=null", f"run.name={before.__name__}"]
    done = dnc("train", "run.yaml", *(part for change in changes for part in ("--set", change)), folder=place, before=before)
    assert done == Done(0, "", "")
    assert metrics(place / "runs" / before.__name__, "epoch")[-1]["epoch"] == 1


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        ("> /dev/full", 1, "error: No space left on device; free space there, or choose another folder\n"),
        ("2> /dev/full", 0, ""),
        ("2>&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("| head -1", 0, ""),
    ],
)
def test_a_result_needs_a_place(redirection: str, code: int, message: str) -> None:
    command = f"{sys.executable} -m dnc_dist config --keys {redirection}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stderr.startswith(message)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
