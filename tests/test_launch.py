"""The launcher with tiny scripts as workers: exit codes, the first error alone, signals, and no process left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dnc_dist.base.errors import InputError
from dnc_dist.processes.launch import launch_workers, verdict, workers, workers_here
from dnc_dist.processes.launch.verdict import Failure, LaunchReport

PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from dnc_dist.config import ConfigError
from dnc_dist.base.errors import InputError, Stopped
from dnc_dist.processes.worker import run_worker
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
"""

# A worker that says that it is there and waits; SIGTERM makes it "save" and stop, as training does.
OBEDIENT = """
def work():
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    Path(os.environ["HERE"], f"{rank}.pid").write_text(str(os.getpid()))
    while not asked:
        time.sleep(0.02)
    time.sleep(0.5 * rank)
    Path(os.environ["HERE"], f"{rank}.saved").touch()
    raise Stopped("saved")
sys.exit(run_worker(work))
"""


def command(body: str) -> list[str]:
    return [sys.executable, "-c", PRELUDE + body]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition: object, seconds: float = 20) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@contextmanager
def launcher(folder: Path, body: str, nproc: int = 2) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A launcher in a process of its own, once all its workers have written their pids."""
    start = """
import sys
from dnc_dist.processes.launch import launch_workers
sys.exit(launch_workers([sys.executable, "-c", sys.argv[1]], int(sys.argv[2])))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", start, PRELUDE + body, str(nproc)],
        env=os.environ | {"HERE": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    files = [folder / f"{rank}.pid" for rank in range(nproc)]
    pids: list[int] = []
    try:
        wait_for(lambda: process.poll() is not None or all(file.exists() and file.read_text() for file in files), 60)
        assert process.poll() is None, process.communicate()
        pids = [int(file.read_text()) for file in files]
        yield process, pids
    finally:
        for pid in [process.pid, *pids]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def test_rank_0_is_heard_and_the_environment_is_complete(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    body = """
print(f"rank {rank} of {world}", os.environ["LOCAL_RANK"], "MASTER_ADDR" in os.environ, sys.flags.safe_path, os.environ["OMP_NUM_THREADS"])
print("a warning", file=sys.stderr)
"""
    assert launch_workers(command(body), 2) == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    out, err = capfd.readouterr()
    assert out == f"rank 0 of 2 0 True True {threads}\n"
    assert err == "a warning\n"


def test_the_first_error_is_printed_once(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", str(tmp_path))
    # A connection is closed when the process of the peer ends, however long that takes on a busy machine.
    body = """
def ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True

def work():
    peer = Path(os.environ["HERE"], "peer")
    if rank == 1:
        peer.with_suffix(".part").write_text(str(os.getpid()))
        peer.with_suffix(".part").rename(peer)
        raise RuntimeError("the real reason")
    while not peer.exists() or not ended(peer.read_text()):
        time.sleep(0.01)
    raise ConnectionError("closed by peer")
sys.exit(run_worker(work))
"""
    assert launch_workers(command(body), 3) == 1
    err = capfd.readouterr().err
    assert err.endswith("rank 1 failed: RuntimeError: the real reason\n")
    assert err.count("Traceback") == 1 and "in work" in err
    assert "closed by peer" not in err


def test_wrong_input_is_one_message_and_exit_code_2(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_workers(command('def work(): raise InputError("a.tar is truncated")\nsys.exit(run_worker(work))'), 3) == 2
    assert capfd.readouterr() == ("", "error: a.tar is truncated\n")


def test_a_killed_rank_is_named_though_others_complain(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERE", str(tmp_path))
    # Rank 2 hangs, as in a collective, and ignores SIGTERM's default; the killed rank had started a loader process.
    body = """
def work():
    if rank == 1:
        child = os.fork()
        if child == 0:
            time.sleep(600)
        Path(os.environ["HERE"], "child").write_text(str(child))
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3 if rank == 0 else 600)
    raise ConnectionError("closed by peer")
sys.exit(run_worker(work))
"""
    start = time.monotonic()
    assert launch_workers(command(body), 3, failure_grace=1) == 1
    assert time.monotonic() - start < 9, "a rank that hangs is ended soon"
    assert capfd.readouterr().err == "rank 1 was killed by SIGKILL\n"
    wait_for(lambda: not alive(int((tmp_path / "child").read_text())))


def test_a_rank_that_cannot_even_start_shows_its_output(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_workers(command("if rank == 1: raise SystemExit('no such library')\ntime.sleep(60)"), 2, failure_grace=0.2) == 1
    assert capfd.readouterr().err == "no such library\nrank 1 ended with exit code 1\n"


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ("", "Invalid JSON"),
        ("5", "Input should be an object"),
        ('{"time": "now"}', "time: Input should be a valid number"),
        ("[" * 10_000, "JSON"),
    ],
    ids=["empty", "number", "text", "deep"],
)
def test_a_damaged_record_of_an_error_is_said_beside_the_exit_code(record: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text(record)
    (tmp_path / "1.err").write_text("no such library\n")
    code, message = verdict(workers._report({0: None, 1: 7}, tmp_path))
    assert code == 1 and re.fullmatch(rf"no such library\n\S+1\.json is damaged: .*{why}.*\nrank 1 ended with exit code 7", message), (
        message
    )


def test_stopped_workers_end_with_75(capfd: pytest.CaptureFixture[str]) -> None:
    body = "def work():\n    time.sleep(rank)\n    raise Stopped('saved at step 7')\nsys.exit(run_worker(work))"
    assert launch_workers(command(body), 2, failure_grace=0.1) == 75
    assert capfd.readouterr().err == "stopped: saved at step 7\n"


@pytest.mark.parametrize(("end", "code"), [("raise Stopped('saved')", 75), ("print('RESULT')", 0)])
def test_a_library_that_hangs_does_not_keep_a_worker(end: str, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    body = f"""
import atexit
from dnc_dist.processes.worker import skip_shutdown
def work():
    atexit.register(time.sleep, 600)
    skip_shutdown()
    {end}
sys.exit(run_worker(work))
"""
    started = time.monotonic()
    assert launch_workers(command(body), 1) == code
    assert time.monotonic() - started < 60
    assert capfd.readouterr() == (("RESULT\n", "") if code == 0 else ("", "stopped: saved\n"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_signals_make_the_workers_save(tmp_path: Path, number: signal.Signals) -> None:
    with launcher(tmp_path, OBEDIENT) as (process, pids):
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 75
        assert [rank for rank in (0, 1) if not (tmp_path / f"{rank}.saved").exists()] == []
        assert err.splitlines()[0].startswith(f"{number.name}: the workers save and stop")
        assert not any(alive(pid) for pid in pids)


def test_workers_stop_when_the_launcher_is_killed(tmp_path: Path) -> None:
    with launcher(tmp_path, OBEDIENT) as (process, pids):
        process.kill()
        wait_for(lambda: not any(alive(pid) for pid in pids))
        assert (tmp_path / "0.saved").exists() and (tmp_path / "1.saved").exists()


def test_a_second_interrupt_ends_workers_that_do_not_stop(tmp_path: Path) -> None:
    with launcher(tmp_path, OBEDIENT.replace("while not asked:", "while True:")) as (process, pids):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1
        assert err.splitlines()[-1].startswith("killed before it had stopped: rank 0, 1")
        assert not any(alive(pid) for pid in pids)


def test_workers_outlive_whoever_reads_their_output(tmp_path: Path) -> None:
    body = """
def work():
    for line in range(20):
        print(line)
        time.sleep(0.01)
    Path(os.environ["HERE"], "done").touch()
sys.exit(run_worker(work))
"""
    start = (
        "import sys; from dnc_dist.processes.launch import launch_workers; sys.exit(launch_workers([sys.executable, '-c', sys.argv[1]], 1))"
    )
    environment = os.environ | {"HERE": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", start, PRELUDE + body], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.wait(30) == 0 and process.stderr.read() == ""
    assert (tmp_path / "done").exists()
    process.stderr.close()


@pytest.mark.parametrize(("gpus", "usable", "expected"), [(0, False, 2), (1, True, 1), (2, True, 2), (8, True, 8), (4, False, 2)])
def test_one_worker_per_gpu_or_two(gpus: int, usable: bool, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The last: a driver that is too old for this torch, whose GPUs are only counted.
    monkeypatch.setattr(workers, "_has_driver", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    assert workers_here(None) == expected


def test_more_workers_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers_here(5) == 5 or torch.cuda.is_available()
    monkeypatch.setattr(workers, "_has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (workers_here(None), workers_here(1), workers_here(2)) == (2, 1, 2)
    with pytest.raises(InputError, match=r"--nproc 3, but torch sees 2 GPU\(s\) here, .*; use at most 2"):
        workers_here(3)


def error(moment: float, kind: str = "RuntimeError", text: str = "x") -> Failure:
    return Failure(moment, 1, kind, text, f"Traceback\n{kind}: {text}\n")


STARTING = "stopped while the workers started, before there was anything to save; the same command starts again"


@pytest.mark.parametrize(
    ("codes", "errors", "stopping", "expected"),
    [
        ({0: 0, 1: 0}, {}, False, (0, "")),
        ({0: 0, 1: 0}, {}, True, (0, "")),
        ({0: 1, 1: 1}, {0: error(2.0), 1: error(1.0, text="y")}, False, (1, "Traceback\nRuntimeError: y\nrank 1 failed: RuntimeError: y")),
        ({0: 1, 1: -11}, {0: error(1.0)}, False, (1, "rank 1 was killed by SIGSEGV")),
        ({0: -6, 1: 1}, {1: error(1.0)}, False, (1, "Traceback\nRuntimeError: x\nrank 1 failed: RuntimeError: x")),
        ({0: -6, 1: None}, {}, False, (1, "rank 0 was killed by SIGABRT")),
        ({0: 1, 1: 7}, {0: error(1.0)}, False, (1, "rank 1 ended with exit code 7")),
        ({0: 75, 1: 75}, {}, False, (75, "")),
        ({0: 75, 1: None}, {}, True, (75, "")),
        ({0: 75, 1: 1}, {1: error(1.0)}, True, (1, "Traceback\nRuntimeError: x\nrank 1 failed: RuntimeError: x")),
        ({0: -15, 1: 1}, {1: error(1.0)}, True, (75, STARTING)),
        ({0: -15, 1: -6}, {}, True, (75, STARTING)),
        ({0: -15, 1: 75, 2: None}, {}, True, (75, "")),
        ({0: 2, 1: -15, 2: 1}, {0: error(2.0, "InputError", "no data"), 2: error(1.0)}, True, (2, "error: no data")),
        ({0: -15, 1: -11}, {}, True, (1, "rank 1 was killed by SIGSEGV")),
        ({0: -15, 1: 1}, {}, True, (1, "rank 1 ended with exit code 1")),
        ({0: -15, 1: None}, {}, False, (1, "rank 0 was killed by SIGTERM")),
        (
            {0: None, 1: 0},
            {},
            True,
            (1, "killed before it had stopped: rank 0; the same command goes on from the last checkpoint, if there is one"),
        ),
    ],
)
def test_verdict(codes: dict[int, int | None], errors: dict[int, Failure], stopping: bool, expected: tuple[int, str]) -> None:
    assert verdict(LaunchReport(codes, errors), stopping=stopping) == expected


HOSTS = {0: "a", 1: "a", 2: "b", 3: "b"}


@pytest.mark.parametrize(
    ("codes", "errors", "stopping", "expected"),
    [
        ({0: 1, 1: 1, 2: -9, 3: 1}, {0: error(1.0), 1: error(1.0), 3: error(1.0)}, False, (1, "rank 2 on b was killed by SIGKILL")),
        ({0: 1, 1: None, 2: 0, 3: 2}, {0: error(2.0), 3: error(1.0, text="no data")}, False, (2, "error: rank 3 on b: no data")),
        (dict.fromkeys(range(4), 2), {rank: error(rank, text="no data") for rank in range(4)}, False, (2, "error: no data")),
        ({0: 75, 1: 75}, {}, True, (75, "b: gone; the other workers have stopped")),
        ({0: None, 1: None}, {}, False, (1, "b: gone")),
        ({0: 1, 1: None}, {0: error(1.0)}, False, (1, "Traceback\nRuntimeError: x\nrank 0 on a failed: RuntimeError: x\nb: gone")),
        ({0: -9, 1: None}, {}, False, (1, "rank 0 on a was killed by SIGKILL")),
        ({0: 0, 1: 0}, {}, False, (0, "")),
    ],
)
def test_verdict_of_two_machines(
    codes: dict[int, int | None], errors: dict[int, Failure], stopping: bool, expected: tuple[int, str]
) -> None:
    lost = {} if 3 in codes else {"b": "gone"}
    assert verdict(LaunchReport(codes, errors, lost=lost), stopping=stopping, hosts=HOSTS) == expected
