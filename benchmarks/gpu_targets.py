"""What `benchmarks.gpu` has measured beside what it should be. What was not measured is told as missing, and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Missing(Exception):
    """Why there is no number."""


@dataclass(frozen=True)
class Target:
    """A number and its bound.

    Attributes:
        what: it is.
        bound: that it should reach, or stay below.
        unit: behind the number; "%" shows shares.
        measured: takes it from the folder of results; raises Missing.
        at_least: whether more is better.
    """

    what: str
    bound: float
    unit: str
    measured: Callable[[Path], float]
    at_least: bool = True


def rows(out: Path, pattern: str) -> list[Row]:
    """The lines of the result files of this name; a last line that a time limit cut off is left out."""
    found: list[Row] = []
    for file in sorted(out.glob(pattern)):
        lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            try:
                found.append(json.loads(line))
            except ValueError:
                if number + 1 < len(lines):
                    raise
    return found


def value(out: Path, family: str, name: str, *path: str | int, **size: Any) -> float:
    """A number of the row of an implementation at a size.

    Raises:
        Missing: there is no such row, or it has no such number.
    """
    found = [
        row
        for row in rows(out, f"kernels_{family}_*.jsonl")
        if row["implementation"] == name and all(row.get(key) == at for key, at in size.items())
    ]
    if not found:
        raise Missing(f"no row of {name} at this size")
    number: Any = found[-1]
    if number["outcome"] != "ok":
        raise Missing(f"{name}: {number['outcome']}")
    for part in path:
        number = number.get(part) if isinstance(number, dict) else number[part]
        if number is None:
            raise Missing(f"{name}: {part} was not measured")
    return float(number)


def margin(rows: int) -> dict[str, Any]:
    return {"rows": rows, "dim": 512, "learners": 4, "masks": "soft"}


LLOYD = {"rows": 10_000_000, "dim": 512, "centroids": 32, "dtype": "bfloat16"}


def times(out: Path, family: str, other: str, theirs: str, ours: str, size: dict[str, Any]) -> float:
    """How many times faster than the other implementation ours is."""
    return value(out, family, other, theirs, 0, **size) / value(out, family, "triton", ours, 0, **size)


def beside_the_bare_network(out: Path, backbone: str) -> float:
    """Time of a step of the bare network by that of ours."""
    found = [row for row in rows(out, "step.jsonl") if row["problem"]["backbone"] == backbone]
    if not found:
        raise Missing(f"no row of {backbone}")
    return float(found[-1]["bare_over_ours"])


TARGETS = [
    Target("loss step, B=1024, D=512, K=4: faster than pytorch-metric-learning", 10, "x",
           lambda out: times(out, "margin", "pytorch-metric-learning", "full_ms", "full_ms", margin(1024))),
    Target("the same: faster than torch.compile", 2, "x",
           lambda out: times(out, "margin", "compile", "full_ms", "full_ms", margin(1024))),
    Target("the same in CUDA graphs: faster than torch.compile in CUDA graphs", 2, "x",
           lambda out: times(out, "margin", "compile-graphs", "full_ms", "graph_ms", margin(1024))),
    Target("loss step, B=65,536, D=512, K=4: memory", 2000, "MB",
           lambda out: value(out, "margin", "triton", "peak_mb", **margin(65536)), at_least=False),
    Target("the same: share of the roofline", 0.6, "%", lambda out: value(out, "margin", "triton", "roofline", **margin(65536))),
    Target("Lloyd step, bfloat16, 10,000,000 x 512, K=32: share of the copy bandwidth", 0.75, "%",
           lambda out: value(out, "kmeans", "triton", "copy_bandwidth", **LLOYD)),
    Target("the same: faster than flash-kmeans", 3, "x",
           lambda out: times(out, "kmeans", "flash-kmeans", "iteration_ms", "iteration_ms", LLOYD)),
    Target("training step, conv4: share of the bare network's speed", 0.9, "%", lambda out: beside_the_bare_network(out, "conv4")),
    Target("training step, resnet18: share of the bare network's speed", 0.9, "%", lambda out: beside_the_bare_network(out, "resnet18")),
]  # fmt: skip


def shown(number: float, unit: str) -> str:
    return f"{100 * number:.0f} %" if unit == "%" else f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"


def line(target: Target, out: Path) -> str:
    """A line of the table."""
    bound = f"{'at least' if target.at_least else 'below'} {shown(target.bound, target.unit)}"
    try:
        number = target.measured(out)
    except Missing as reason:
        return f"| {target.what} | {bound} | missing: {reason} | |"
    met = number >= target.bound if target.at_least else number < target.bound
    return f"| {target.what} | {bound} | {shown(number, target.unit)} | {'met' if met else 'not met'} |"


def training(out: Path) -> str:
    """What the quickstart's epochs say of speed and waiting, from its log."""
    epochs = [row for row in rows(out, "runs/quickstart/metrics.jsonl") if row["kind"] == "epoch"]
    if not epochs:
        return "Quickstart: missing, no epoch was finished."
    lines = ["Quickstart, by epoch:", "", "| epoch | images/s | waiting for data | dividing | evaluating | seconds |", "|" + " --- |" * 6]
    for row in epochs:
        shares = " | ".join(f"{100 * row[f'share_{part}']:.0f} %" for part in ("data", "divide", "evaluate"))
        lines.append(f"| {row['epoch']} | {row['images_per_second']:.0f} | {shares} | {row['seconds']:.1f} |")
    return "\n".join(lines)


def targets(out: Path) -> str:
    """The page."""
    lines = ["| what | target | measured | |", "| --- | --- | --- | --- |", *(line(target, out) for target in TARGETS)]
    return "\n".join([*lines, "", training(out), ""])
