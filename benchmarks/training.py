"""One training in a process of its own, and what it reached: for benchmarks that compare configurations."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any


@dataclass(frozen=True)
class Trained:
    """What a run left: its RESULT line, its evaluations by epoch, the lines of metrics.jsonl, and what this attempt cost."""

    result: dict[str, Any]
    evaluations: dict[int, dict[str, Any]]
    lines: list[dict[str, Any]]
    cpu_seconds: float
    seconds: float

    def percent(self, metric: str) -> dict[int, float]:
        """A metric in % by epoch."""
        return {epoch: round(100 * line[metric], 2) for epoch, line in self.evaluations.items()}


def train(config: Path, name: str, runs: Path, overrides: Sequence[str], *, processes: int = 1, nice: int = 0) -> Trained:
    """Train a configuration, each process on one core; a run that was interrupted goes on, one that is complete is read only.

    Args:
        config: the configuration file.
        name: of the run's folder in ``runs``.
        overrides: KEY=VALUE, later ones win.
        processes: ranks.
        nice: how much other processes go before (0 to 19).

    Raises:
        SystemExit: the run failed; the message has its last lines.
    """
    values = [f"run.dir={runs}", f"run.name={name}", "tracker.kind=jsonl", *overrides]
    verb = ["train", str(config)] if processes == 1 else ["launch", str(config), "--nproc", str(processes)]
    command = [sys.executable, "-m", "dnc_dist", *verb, *(part for value in values for part in ("--set", value))]
    started = time.monotonic()
    with TemporaryFile() as out, TemporaryFile() as told:
        child = subprocess.Popen(["nice", "-n", str(nice), *command], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=out, stderr=told)
        # wait4 tells what this child used; os.times would mix those that run side by side.
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output, errors = (file.seek(0) or file.read().decode() for file in (out, told))
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {child.returncode}:\n{errors[-2000:]}")
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Trained(
        result=json.loads(output.rsplit("RESULT ", 1)[1]),
        evaluations={line["epoch"]: line for line in lines if line["kind"] == "evaluation"},
        lines=lines,
        cpu_seconds=round(usage.ru_utime + usage.ru_stime, 1),
        seconds=round(time.monotonic() - started, 1),
    )


def cell(values: Sequence[float], digits: int = 2, *, signed: bool = False) -> str:
    """Mean ± standard deviation as a cell of a table; without a deviation for one value."""
    mean = f"{statistics.mean(values):{'+' if signed else ''}.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")
