"""Breaks real runs in every way that a cluster does, and writes what the user sees to docs/faults.md.

    python -m tests.fault_table [--only NAME]... [--out docs/faults.md]

Every fault meets its own copy of the same training on two processes. What it interrupted goes on with the same command, and must
end with the RESULT and the curve of the undisturbed run. A full disk is a small file system in memory, which needs root.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from dnc_dist.trackers.wandb import INIT_SECONDS
from tests.run_fixtures import Done, make_dataset, metrics, timeless, wait_until, write_config

STEP = 23
"""Faults happen in mid-epoch: after this step, which is no checkpoint."""
EVERY_STEPS = 10
DELAY_SECONDS = 30.0
_SLOW_DISK = f"""
import os, time

fsync = os.fsync

def slow(file):
    if os.environ.get("RANK") == "1" and "/.step-{STEP // EVERY_STEPS * EVERY_STEPS:08d}.tmp/" in os.readlink(f"/proc/self/fd/{{file}}"):
        time.sleep(60)
    fsync(file)

os.fsync = slow
"""
STALL_SECONDS = 5.0


class Row(NamedTuple):
    """What came of one fault; ``seconds`` from the fault to the end or the message, ``lost`` steps that were trained twice."""

    fault: str
    sees: str
    code: int | None
    seconds: float
    lost: int
    same: bool


@dataclass
class Trial:
    """One training in a folder, and the fault that happens to it."""

    folder: Path
    prefix: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    """Folders in which Python looks for modules first."""
    cleanup: ExitStack = field(default_factory=ExitStack)
    seconds: float = 0.0
    first: Done | None = None
    lost: int = 0
    _process: subprocess.Popen[str] | None = None
    _since: float = 0.0
    _starts: int = 0

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder / "runs" / "run"

    def start(self, *more: str, terminal: int | None = None) -> None:
        """Start ``dnc-dist launch`` in the background; what it says goes to files, or to a terminal."""
        self._starts += 1
        command = [*self.prefix, sys.executable, "-m", "dnc_dist", "launch", "run.yaml", "--nproc", "2"]
        command += [part for change in (*self.changes, *more) for part in ("--set", change)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | self.environment
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([*self.modules, *sys.path])}
        with self._output("out").open("w") as out, self._output("err").open("w") as err:
            streams = {"stdout": out, "stderr": err} if terminal is None else {"stdout": terminal, "stderr": terminal}
            self._process = subprocess.Popen(command, cwd=self.folder, text=True, env=environment, **streams)  # type: ignore[call-overload]
        self.fault()

    def fault(self) -> None:
        """What follows is the fault's doing: the clock runs from here."""
        self._since = time.monotonic()

    def _output(self, stream: str) -> Path:
        return self.folder / f"{self._starts}.{stream}"

    @property
    def process(self) -> subprocess.Popen[str]:
        """The launcher."""
        assert self._process is not None
        return self._process

    def reach(self, step: int = STEP) -> None:
        """Wait until the run has logged a step."""
        wait_until(lambda: any(line["step"] >= step for line in metrics(self.run, "train")) or self.process.poll() is not None)
        assert self.process.poll() is None, self.end()
        self.fault()

    def start_and_stop(self) -> None:
        """Train to the step of the faults, and stop there with a checkpoint; the fault is yet to come."""
        self.start()
        self.reach()
        kill(self.process, signal.SIGTERM)
        self.process.wait(timeout=60)

    def worker(self, rank: int) -> psutil.Process:
        """The worker of a rank."""
        return next(child for child in psutil.Process(self.process.pid).children() if child.environ().get("RANK") == str(rank))

    def loader(self, rank: int) -> psutil.Process:
        """The process that loads the images of a rank: the one of its descendants that has no children and runs multiprocessing's code."""
        servers = [child for child in self.worker(rank).children() if any("forkserver" in part for part in child.cmdline())]
        return next(child for server in servers for child in server.children())

    def said(self, text: str) -> None:
        """Wait until the run says something about the fault."""
        wait_until(lambda: re.search(text, self._output("out").read_text() + self._output("err").read_text()))
        self.seconds = time.monotonic() - self._since

    def end(self) -> Done:
        """Wait for the end of the launcher."""
        code = self.process.wait(timeout=300)
        done = Done(code, self._output("out").read_text(), self._output("err").read_text())
        if self.first is None:
            self.first = done
            self.seconds = self.seconds or time.monotonic() - self._since
        return done

    def go_on(self, *more: str) -> Done:
        """Wait for the end, then go on with the same command."""
        self.end()
        reached = max((line["step"] for line in metrics(self.run, "train")), default=0)
        self.start(*more)
        done = self.end()
        resumed = re.search(r"resumed in epoch \d+, after step (\d+)", done.out)
        self.lost = reached - (int(resumed[1]) if resumed else 0) if reached else 0
        return done


class Fault(NamedTuple):
    """A way to break a run: ``inject`` leaves the trial ended, and returns how its last start ended.

    ``waits``: seconds for which the run waits on purpose before it says anything, or for which the fault lasts.
    """

    name: str
    code: int
    sees: str
    inject: Callable[[Trial], Done]
    waits: float


FAULTS: list[Fault] = []


def fault(name: str, code: int, sees: str, waits: float = 0.0) -> Callable[[Callable[[Trial], Done]], Callable[[Trial], Done]]:
    """Add a function to the table.

    Args:
        code: exit code of the broken start.
        sees: a pattern of the line that tells the user.
        waits: see ``Fault``.
    """

    def add(inject: Callable[[Trial], Done]) -> Callable[[Trial], Done]:
        FAULTS.append(Fault(name, code, sees, inject, waits))
        return inject

    return add


def kill(process: psutil.Process | subprocess.Popen[str], number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal."""
    process.send_signal(number)


@fault("SIGKILL of rank 0", 1, "rank 0 was killed by SIGKILL")
def rank_0_killed(trial: Trial) -> Done:
    trial.start()
    trial.reach()
    kill(trial.worker(0))
    return trial.go_on()


@fault("SIGKILL of another rank", 1, "rank 1 was killed by SIGKILL")
def rank_1_killed(trial: Trial) -> Done:
    trial.start()
    trial.reach()
    kill(trial.worker(1))
    return trial.go_on()


@fault("SIGKILL of a rank while a checkpoint is written beside training", 1, "rank 1 was killed by SIGKILL")
def killed_while_writing(trial: Trial) -> Done:
    # The disk of this rank takes long for the checkpoint before the step of the fault; Python imports a module of this name at its start.
    (trial.folder / "disk").mkdir()
    (trial.folder / "disk" / "sitecustomize.py").write_text(_SLOW_DISK)
    trial.modules.append(str(trial.folder / "disk"))
    trial.start()
    trial.reach()
    assert list(trial.run.glob(f"checkpoints/.step-{STEP // EVERY_STEPS * EVERY_STEPS:08d}.tmp")), "it is published already"
    kill(trial.worker(1))
    trial.modules.clear()
    return trial.go_on()


@fault("SIGKILL of the launcher", -signal.SIGKILL, "")
def launcher_killed(trial: Trial) -> Done:
    trial.start()
    trial.reach()
    workers = [trial.worker(rank) for rank in range(2)]
    kill(trial.process)
    # Workers that lose their launcher save and stop by themselves.
    psutil.wait_procs(workers, timeout=60)
    trial.seconds = time.monotonic() - trial._since
    return trial.go_on()


@fault("SIGTERM", 75, r"stopped: in epoch \d+ after step \d+; saved")
def terminated(trial: Trial) -> Done:
    trial.start()
    trial.reach()
    kill(trial.process, signal.SIGTERM)
    return trial.go_on()


@fault("the terminal is closed", 75, "")
def terminal_closed(trial: Trial) -> Done:
    # From then on nobody can write there, and the launcher gets a hangup, as from the kernel.
    master, slave = pty.openpty()
    trial.start(terminal=slave)
    os.close(slave)
    trial.reach()
    os.close(master)
    kill(trial.process, signal.SIGHUP)
    return trial.go_on()


@fault("SIGHUP of one worker", 75, r"stopped: in epoch \d+ after step \d+; saved")
def worker_hung_up(trial: Trial) -> Done:
    trial.start()
    trial.reach()
    kill(trial.worker(1), signal.SIGHUP)
    return trial.go_on()


@fault("out of memory in one rank", 1, r"rank 1( failed)?: .*([Mm]emory|allocate)")
def out_of_memory(trial: Trial) -> Done:
    trial.start()
    trial.reach()
    process = trial.worker(1)
    # The address space cannot grow any more, as if the machine's memory were used up.
    resource.prlimit(process.pid, resource.RLIMIT_AS, (process.memory_info().vms // 2,) * 2)
    return trial.go_on()


@fault("a loader process is killed", 1, r"rank 1(: a loader process was ended from outside| failed: .*DataLoader worker .*killed)")
def loader_killed(trial: Trial) -> Done:
    trial.start()
    trial.reach()
    kill(trial.loader(1))
    return trial.go_on()


@fault("exception in a loader process: shards vanish", 1, r"rank \d: FileNotFoundError.*\.tar")
def loader_exception(trial: Trial) -> Done:
    data = trial.folder / "data"
    # Seen when the loader is started anew, which opens its shards for the first time.
    trial.start()
    trial.reach(1)
    data.rename(trial.folder / "away")
    trial.end()
    (trial.folder / "away").rename(data)
    return trial.go_on()


@fault("a corrupt image", 0, r"1 image\(s\) cannot be decoded and take part in nothing: ")
def corrupt_image(trial: Trial) -> Done:
    _break_image(trial.folder / "data")
    trial.start()
    trial.said(r"1 image\(s\) cannot be decoded")
    return trial.end()


@fault("a truncated shard", 2, r"\.tar has .* bytes")
def truncated_shard(trial: Trial) -> Done:
    shard = sorted((trial.folder / "data").glob("*.tar"))[3]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    trial.start()
    trial.end()
    shard.write_bytes(whole)
    return trial.go_on()


@fault("a missing shard", 2, r"shard.*missing|no such|not there|missing")
def missing_shard(trial: Trial) -> Done:
    shard = sorted((trial.folder / "data").glob("*.tar"))[3]
    shard.rename(trial.folder / "away.tar")
    trial.start()
    trial.end()
    (trial.folder / "away.tar").rename(shard)
    return trial.go_on()


@fault("disk full while a checkpoint is saved", 1, r"cannot be written.*, \d+ MB are free there; `--resume auto` goes on later")
def disk_full(trial: Trial) -> Done:
    runs = trial.folder / "runs"
    runs.mkdir()
    trial.cleanup.enter_context(_small_disk(runs))
    trial.start()
    trial.reach()
    free = shutil.disk_usage(runs).free
    (runs / "filler").write_bytes(bytes(free - 200_000))
    trial.end()
    (runs / "filler").unlink()
    return trial.go_on()


@fault("disk full for metrics.jsonl", 1, r"metrics\.jsonl cannot be written \(.*\); .*`--resume auto` goes on later")
def disk_full_for_metrics(trial: Trial) -> Done:
    trial.start()
    trial.reach()
    # The next line does not fit any more: no file of this process may be longer than the longest of the small ones is now.
    size = (trial.run / "metrics.jsonl").stat().st_size
    resource.prlimit(trial.worker(0).pid, resource.RLIMIT_FSIZE, (size, size))
    return trial.go_on()


@fault("the pointer `latest` is damaged", 0, r"latest names no checkpoint that is there; the newest whole one is used")
def pointer_damaged(trial: Trial) -> Done:
    trial.start_and_stop()
    (trial.run / "checkpoints" / "latest").write_bytes(b"\xff\0")
    trial.start()
    trial.said("latest names no checkpoint")
    return trial.end()


@fault("the run directory is deleted", 1, r"runs/run was removed, or its checkpoints were")
def run_directory_deleted(trial: Trial) -> Done:
    trial.start()
    trial.reach()
    reached = max(line["step"] for line in metrics(trial.run, "train"))
    shutil.rmtree(trial.run)
    done = trial.go_on()
    trial.lost = reached  # there is nothing to go on from
    return done


@fault("/dev/shm is full", 2, r"data.workers=1 cannot go on: .*/dev/shm has")
def no_shared_memory(trial: Trial) -> Done:
    # In mounts of its own, so that no other process loses its shared memory.
    trial.prefix = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=4k none /dev/shm && exec "$@"', "sh"]
    trial.start()
    trial.end()
    trial.prefix = []
    return trial.go_on()


@fault("corrupt latest checkpoint", 0, r"checkpoint .* is damaged .*; not used")
def corrupt_checkpoint(trial: Trial) -> Done:
    trial.start_and_stop()
    newest = trial.run / "checkpoints" / (trial.run / "checkpoints" / "latest").read_text().strip()
    file = max(newest.glob("*.pt"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    reached = max(line["step"] for line in metrics(trial.run, "train"))
    trial.start()
    trial.said("is damaged")
    done = trial.end()
    resumed = re.search(r"resumed in epoch \d+, after step (\d+)", done.out)
    assert resumed is not None, done
    trial.lost = reached - int(resumed[1])
    return done


@fault("W&B cannot be reached", 0, "W&B", waits=INIT_SECONDS)
def wandb_unreachable(trial: Trial) -> Done:
    trial.changes.append("tracker.kind=wandb")
    # A port where nobody listens, and a key of the right length.
    trial.environment |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    trial.start()
    trial.said("W&B")
    return trial.end()


@fault(f"a rank is delayed by {DELAY_SECONDS:.0f} s", 0, "", waits=DELAY_SECONDS)
def delayed(trial: Trial) -> Done:
    trial.start()
    trial.reach()
    worker = trial.worker(1)
    kill(worker, signal.SIGSTOP)
    time.sleep(DELAY_SECONDS)
    kill(worker, signal.SIGCONT)
    trial.seconds = DELAY_SECONDS
    return trial.end()


@fault("a rank hangs", 1, r"rank 1 .* (does not answer|keeps the other ranks waiting)")
def hanging(trial: Trial) -> Done:
    trial.changes.append(f"engine.stall_timeout={STALL_SECONDS}")
    trial.start()
    trial.reach()
    kill(trial.worker(1), signal.SIGSTOP)
    return trial.go_on()


@fault("the loss becomes NaN", 1, r"not finite")
def not_finite(trial: Trial) -> Done:
    trial.start_and_stop()
    trial.start("optim.lr=1e30")
    trial.end()
    assert list((trial.run / "not-finite").glob("*.npz")), "the batch was not written"
    return trial.go_on()


def _break_image(root: Path) -> None:
    """Overwrite the bytes of one training image."""
    from dnc_dist.data.index import open_index

    index = open_index(root)
    row = int(index.view("train").rows[5])
    path = index.shard_paths[index.columns["shard"][row]]
    content = bytearray(path.read_bytes())
    start, size = (int(index.columns[name][row]) for name in ("offset", "size"))
    content[start : start + size] = b"x" * size
    path.write_bytes(content)


@contextmanager
def _small_disk(place: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


class Table:
    """Runs faults against one dataset and one undisturbed run (for the corrupt image: an undisturbed run without this image)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_dataset(folder, classes=24, per_class=12)
        self.expected = self._reference("undisturbed", lambda trial: None)
        self.without_image = self._reference("without-image", lambda trial: _break_image(trial.folder / "data"))

    def trial(self, name: str) -> Trial:
        """A folder with a copy of the data and the configuration."""
        place = self.folder / re.sub(r"\W+", "-", name)
        place.mkdir()
        shutil.copytree(self.folder / "data", place / "data")
        write_config(
            place,
            Path("data"),
            data={"workers": 1},
            schedule={"epochs": 4},
            checkpoint={"every_steps": EVERY_STEPS, "keep": 2},
        )
        return Trial(place)

    def _reference(self, name: str, prepare: Callable[[Trial], None]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        trial = self.trial(name)
        prepare(trial)
        trial.start()
        return trial.end().result, timeless(trial.run)

    def row(self, one: Fault) -> Row:
        """Inject a fault and compare what comes of the run with the undisturbed one."""
        trial = self.trial(one.name)
        with trial.cleanup:
            done = one.inject(trial)
            expected = self.without_image if one.inject is corrupt_image else self.expected
            same = done.code == 0 and (done.result, timeless(trial.run)) == expected
            assert trial.first is not None
            return Row(one.name, self._sees(one, trial, done), trial.first.code, trial.seconds, trial.lost, same)

    def _sees(self, one: Fault, trial: Trial, done: Done) -> str:
        if not one.sees:
            return "nothing"
        lines = "\n".join((trial.first.out, trial.first.err, done.out, done.err)).splitlines() if trial.first else []
        found = next((line for line in lines if re.search(one.sees, line)), None)
        if found is None:  # for whoever looks for the reason
            return "something else:\n" + (trial.first.err[-2000:] if trial.first else "")
        return found.replace(str(trial.folder), "…")


def markdown(rows: list[Row]) -> str:
    """The page."""
    lines = [
        "# What happens when something breaks",
        "",
        "Written by `python -m tests.fault_table`: each fault meets a real training on two processes (CPU, gloo) in mid-epoch, with a",
        f"checkpoint every {EVERY_STEPS} steps. What it interrupted goes on with the same command. *Same* means that RESULT and every line",
        "of `metrics.jsonl`, but for times and memory, equal those of the undisturbed run.",
        "",
        f"torch {torch.__version__}, numpy {np.__version__}, {os.cpu_count()} cores. Seconds are from the fault to the end of the command,",
        "or to the message if it goes on; they include starting Python where a fault is met at start. Steps lost are trained again.",
        "",
        "| fault | what the user sees | exit code | seconds | steps lost | same final metrics |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        sees = row.sees if row.sees == "nothing" else f"`{row.sees.strip().replace('|', '/').replace('`', chr(39))}`"
        lines.append(f"| {row.fault} | {sees} | {row.code} | {row.seconds:.1f} | {row.lost} | {'yes' if row.same else 'NO'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the faults and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="part of a fault's name; repeatable")
    parser.add_argument("--out", type=Path, help="the page; by default it is printed")
    options = parser.parse_args()
    chosen = [one for one in FAULTS if not options.only or any(part in one.name for part in options.only)]
    with tempfile.TemporaryDirectory() as folder:
        table = Table(Path(folder))
        rows = []
        for one in chosen:
            rows.append(table.row(one))
            print(rows[-1], file=sys.stderr, flush=True)
    page = markdown(rows)
    if options.out:
        options.out.write_text(page, encoding="utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
