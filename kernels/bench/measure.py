"""How all families are timed, what the machine can do, and where the rows go.

A row is one implementation at one size. Where a row has no figure (out of memory, not installed, no time left), its outcome
says why. No row is missing.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "pytorch-metric-learning", "flash-kmeans", "faiss-cpu")
GIB, MB = 1 << 30, 1e6
SHOWN = (
    *("implementation", "kernel", "tile", "rows", "learners", "masks", "dim", "centroids", "dtype", "outcome", "full_ms", "graph_ms"),
    *("eager_ms", "reference_ms", "ratio", "turn_ratios"),
    *("iteration_ms", "peak_mb", "roofline", "copy_bandwidth", "error_embeddings", "objective", "spread", "row_seconds", "copy", "matrix"),
)  # on the screen; the file has everything
COLD_BYTES = 256 << 20  # written before every timed call: more than any second-level cache holds
FEWEST, MOST = 4, 200  # timed calls of a row that is quick enough
SLOW = 2.0  # times a row's seconds: a call that takes longer is timed once, and not repeated for what that one shows


class NotRun(Exception):
    """Why an implementation has no figure at a size: it is not installed, or cannot run here."""


def triton_module(name: str, device: torch.device) -> ModuleType:
    """A module of Triton functions; NotRun where Triton cannot serve the device."""
    from dnc_kernels.target import INTERPRETED

    if device.type != "cuda" and not INTERPRETED.value:
        raise NotRun("Triton serves the CPU in its interpreter only")
    return importlib.import_module(f"dnc_kernels.{name}")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Marks on the device's own clock (CUDA events), on the host's where there is no device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cold = torch.empty(COLD_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def mark(self) -> Any:
        if self.cold is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        return 1e3 * (end - start) if self.cold is None else start.elapsed_time(end)

    def cool(self) -> None:
        if self.cold is not None:
            self.cold.zero_()


def num_calls(known: float, seconds: float) -> int:
    """How many calls of `known` seconds take about `seconds`."""
    return 1 if known > SLOW * seconds else min(MOST, max(FEWEST if known < seconds else 2, int(seconds / max(known, 1e-6))))


def milliseconds_in_turns(phases: dict[str, Callable[[], Any]], device: torch.device, turns: int) -> dict[str, list[float]]:
    """Milliseconds of every phase in every turn; a turn runs each phase once, one after the other."""
    clock, marks = Clock(device), []
    for _ in range(turns):
        clock.cool()
        line = [clock.mark()]
        for phase in phases.values():
            phase()
            line.append(clock.mark())
        marks.append(line)
    synchronize(device)
    return {name: [clock.milliseconds(line[number], line[number + 1]) for line in marks] for number, name in enumerate(phases)}


def time_phases(
    phases: dict[str, Callable[[], Any]], device: torch.device, seconds: float, *, known: float | None = None
) -> dict[str, Any]:
    """Run the phases one after the other, again and again for about `seconds`; quantiles of each and of the whole.

    `known`: how many seconds they take, from a call that also warmed them up.
    Returns `<phase>_ms` and `full_ms` as [median, 20 %, 80 %], the number of `calls`, and `spread`: by how much the medians of the
    whole differ between the first and the second half of the calls.
    """
    if known is None:

        def all_phases() -> None:
            for phase in phases.values():
                phase()

        known, _ = once(all_phases, device, 0)
    calls = num_calls(known, seconds)
    times = {f"{name}_ms": values for name, values in milliseconds_in_turns(phases, device, calls).items()}
    times["full_ms"] = full = [sum(parts) for parts in zip(*times.values(), strict=True)]
    row: dict[str, Any] = {name: quantiles(values) for name, values in times.items()} | {"calls": calls}
    if calls > 1:
        first, second = statistics.median(full[: calls // 2]), statistics.median(full[calls // 2 :])
        row["spread"] = round(abs(first - second) / min(first, second), 4)
    return row


def quantiles(values: list[float]) -> list[float]:
    """[median, 20 %, 80 %]."""
    low, high = (statistics.quantiles(values, n=5, method="inclusive")[index] for index in (0, 3)) if len(values) > 1 else (values[0],) * 2
    return [float(f"{value:.5g}") for value in (statistics.median(values), low, high)]


def wall_ms(step: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Milliseconds a step by the host's clock, steps one after the other without a wait: what a training loop sees."""
    calls, started = 0, time.perf_counter()
    while calls < MOST and time.perf_counter() - started < seconds:
        step()
        calls += 1
    synchronize(device)
    return float(f"{1e3 * (time.perf_counter() - started) / calls:.5g}")


def graph_ms(step: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """[median, 20 %, 80 %] milliseconds of a replay of the step captured in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()  # noqa: F841  (its memory belongs to the graph)
    return time_phases({"replay": graph.replay}, device, seconds)["full_ms"]


def once(step: Callable[[], Any], device: torch.device, before: int) -> tuple[float, float | None]:
    """Seconds of one call, and the megabytes that it needs at most beyond the `before` bytes in use (None on a CPU)."""
    cuda = device.type == "cuda"
    synchronize(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step()
    synchronize(device)
    seconds = time.perf_counter() - started
    return seconds, round((torch.cuda.max_memory_allocated() - before) / MB, 1) if cuda else None


def allocated(device: torch.device) -> int:
    """Bytes in use on the device after everything that is out of use has gone."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def ceilings(device: torch.device, *, quick: bool) -> dict[str, float]:
    """What this machine does, measured now: copy (read + write) and read bandwidth, bfloat16 product; and scalar instructions by its clock.

    In bytes, operations and instructions a second; the last two on CUDA only.
    """
    size = 1 << (24 if quick else 31 if device.type == "cuda" else 28)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)

    def best(call: Callable[[], Any]) -> float:
        return time_phases({"call": call}, device, 0.1)["full_ms"][0] / 1e3

    found = {"copy": 2 * size / best(lambda: target.copy_(source)), "read": size / best(source.sum)}
    if device.type == "cuda":
        side = 1024 if quick else 8192
        left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        properties = torch.cuda.get_device_properties(device)
        # 128 lanes an SM; the clock in kHz, or that of an H100 and H200 where this torch does not tell.
        hertz = 1e3 * getattr(properties, "clock_rate", 1_980_000)
        found |= {"matrix": 2 * side**3 / best(lambda: left @ right), "scalar": properties.multi_processor_count * 128 * hertz}
        found["cache"] = float(properties.L2_cache_size)
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def machine(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and time, which every row carries."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU",
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {package: installed(package) for package in PACKAGES} | {"cuda": torch.version.cuda if cuda else None},
        # A machine that is handed files without the repository is told the commit.
        "commit": commit or os.environ.get("DNC_COMMIT", "unknown"),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class Run:
    """The rows of one command. They are written as they come; a budget of seconds ends them."""

    def __init__(self, family: str, args: argparse.Namespace) -> None:
        self.family, self.out, self.device = family, args.out, torch.device(args.device)
        self.deadline = time.monotonic() + args.budget
        self.machine = machine(self.device)
        self.seconds = 0.02 if args.quick else args.seconds
        self.ceilings = ceilings(self.device, quick=args.quick)
        self.write({"implementation": "ceilings", "outcome": "ok", **self.ceilings})

    def write(self, row: dict[str, Any]) -> None:
        line = {"family": self.family, **row, **self.machine}
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        print("  ".join(f"{name}={value}" for name, value in row.items() if name in SHOWN and value is not None), flush=True)

    def row(self, facts: dict[str, Any], measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure one row and write it, whatever comes of it."""
        started = time.monotonic()
        row: dict[str, Any] = {"outcome": "ok"}
        if started > self.deadline:
            row["outcome"] = "no time left in the budget"
        else:
            try:
                row |= measured()
            except NotRun as reason:
                row["outcome"] = f"not run: {reason}"
            except torch.OutOfMemoryError:
                row["outcome"] = "out of memory"
                row["peak_mb"] = round(torch.cuda.max_memory_allocated() / MB, 1)
            except Exception as error:
                row["outcome"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        row["row_seconds"] = round(time.monotonic() - started, 1)
        row = facts | row
        self.write(row)
        return row


def wanted(only: str | None, implementations: Iterable[str]) -> list[str]:
    """The implementations that `--only` names, or all; SystemExit for one that does not exist."""
    known = list(implementations)
    names = only.split(",") if only else known
    if unknown := set(names) - set(known):
        raise SystemExit(f"--only {','.join(sorted(unknown))}: does not exist; there are {', '.join(known)}")
    return names


def arguments(family: str, budget: float, seconds: float) -> argparse.ArgumentParser:
    """The options that all commands have."""
    parser = argparse.ArgumentParser(prog=f"bench.{family}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the script work?")
    parser.add_argument("--out", type=Path, help="append the rows to this file of JSON lines")
    parser.add_argument("--budget", type=float, default=budget, help="seconds after which no row is started")
    parser.add_argument("--seconds", type=float, default=seconds, help="timed seconds a row")
    return parser


def matrix_arguments(family: str, budget: float) -> argparse.ArgumentParser:
    """Those of the commands that run every implementation at every size."""
    parser = arguments(family, budget, seconds=0.5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="comma-separated implementations (default: all)")
    parser.add_argument("--sweep", action="store_true", help="time the tile shapes that the kernels could take, and nothing else")
    return parser
