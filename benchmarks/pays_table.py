"""Tables and a plot of recorded runs: mean ± standard deviation over seeds, and differences of runs with the same seed."""

from __future__ import annotations

import argparse
import statistics
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import recorded_lines
from benchmarks.training import cell
from dnc_dist.base.errors import InputError

_APART = 0.02  # of images seen: the last batches of epochs differ with the size of batches
Line = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """An arm at a point of its axes: seed -> line, and seed -> difference to the first arm with that seed, in points."""

    arm: str
    point: dict[str, Any]
    lines: dict[int, Line]
    gains: dict[int, float]

    @property
    def values(self) -> list[float]:
        """recall@1 in % of each seed."""
        return [line["recall@1"] for line in self.lines.values()]


def rows_of(lines: list[Line]) -> list[Row]:
    """The arms of one matrix, data set and split, in the order in which they were recorded; the arm of the first line is the baseline.

    Raises:
        InputError: two runs that are compared saw different numbers of images.
    """
    grouped: dict[tuple[str, str], dict[int, Line]] = defaultdict(dict)
    for line in lines:
        grouped[line["arm"], repr(sorted(line["point"].items()))][line["seed"]] = line
    baseline = lines[0]["arm"]
    # The baseline may have fewer axes: it has no number of learners, for example. An arm that has fewer is at their first values.
    against = {(repr(sorted(line["point"].items())), line["seed"]): line for line in lines if line["arm"] == baseline}
    first = lines[0]["point"]
    rows = []
    for (arm, _), by_seed in grouped.items():
        point = next(iter(by_seed.values()))["point"]
        mark = repr(sorted((axis, point.get(axis, value)) for axis, value in first.items()))
        gains = {}
        for seed, line in by_seed.items():
            other = against.get((mark, seed))
            if arm == baseline or other is None:
                continue
            if abs(line["samples_seen"] / other["samples_seen"] - 1) > _APART:
                raise InputError(
                    f"{arm} {point} saw {line['samples_seen']:,} images and {baseline} {other['samples_seen']:,} with seed {seed}: "
                    "only runs with the same number are compared"
                )
            gains[seed] = line["recall@1"] - other["recall@1"]
        rows.append(Row(arm, point, by_seed, gains))
    return rows


def _parts(lines: list[Line]) -> dict[tuple[str, str, str], list[Line]]:
    found: dict[tuple[str, str, str], list[Line]] = defaultdict(list)
    for line in lines:
        found[line["matrix"], line["data"], line["split"]].append(line)
    return found


def tables(lines: list[Line]) -> str:
    """A Markdown table for each matrix, data set and split."""
    text = []
    for (matrix, data, split), part in _parts(lines).items():
        rows = rows_of(part)
        axes = list(dict.fromkeys(axis for row in rows for axis in row.point))
        seen = sorted({line["samples_seen"] for line in part})
        commits = ", ".join(sorted({line["commit"] for line in part}))
        text += [
            f"\n{matrix}, {data}, {split} classes, recall@1 in %; {seen[0]:,} to {seen[-1]:,} images seen; commit {commits}\n",
            f"| arm | {''.join(f'{axis} | ' for axis in axes)}seeds | recall@1 | difference, same seeds | ahead | CPU s |",
            "| --- | " + "--- | " * (len(axes) + 5),
        ]
        for row in rows:
            gains = list(row.gains.values())
            ahead = f"{sum(gain > 0 for gain in gains)} of {len(gains)}" if gains else ""
            points = "".join(f"{row.point.get(axis, '')} | " for axis in axes)
            seconds = statistics.mean(line["cpu_seconds"] for line in row.lines.values())
            difference = cell(gains, signed=True) if gains else ""
            text.append(f"| {row.arm} | {points}{len(row.lines)} | {cell(row.values)} | {difference} | {ahead} | {seconds:.0f} |")
    return "\n".join(text)


def plot(lines: list[Line], along: str, path: Path) -> None:
    """recall@1 against an axis, or the difference to the first arm of each other one (``along`` is "arm"): a panel for each data set.

    Bars are one standard deviation long on either side; small marks are single seeds. A first arm without the axis is a dashed line.

    Raises:
        InputError: no arm was run along that axis.
    """
    from matplotlib.figure import Figure

    parts = {key: curves(rows_of(part), along) for key, part in _parts(lines).items()}
    parts = {key: shown for key, shown in parts.items() if any(place is not None for points in shown.values() for place in points)}
    if not parts:
        raise InputError(f"no recorded arm varies along {along!r}")
    figure = Figure(figsize=(5 * len(parts), 4), layout="constrained")
    # Differences of two data sets can share a scale, their recall cannot.
    panels = figure.subplots(1, len(parts), squeeze=False, sharey=along == "arm")[0]
    for panel, ((matrix, data, split), shown) in zip(panels, parts.items(), strict=True):
        places = list(dict.fromkeys(value for points in shown.values() for value in points if value is not None))
        if along != "arm":
            places.sort(key=lambda value: (isinstance(value, str), value))
        for label, points in shown.items():
            if None in points:
                panel.axhline(statistics.mean(points[None]), color="grey", linewidth=1, linestyle="--", label=label)
                continue
            ordered = sorted((places.index(value), values) for value, values in points.items())
            spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in ordered]
            means = [statistics.mean(values) for _, values in ordered]
            line = "none" if along == "arm" else "-"
            curve = panel.errorbar([place for place, _ in ordered], means, spread, label=label, marker="o", capsize=3, linestyle=line)
            seeds = [(place, value) for place, values in ordered for value in values]
            panel.plot(*zip(*seeds, strict=True), linestyle="none", marker="_", color=curve.lines[0].get_color(), alpha=0.6)
        panel.set_xticks(range(len(places)), [textwrap.fill(str(value), 14) for value in places])
        panel.set_title(f"{data}, {split} classes ({matrix})")
        if along == "arm":
            panel.axhline(0, color="grey", linewidth=1)
            panel.set_ylabel("recall@1, points over the first arm")
            panel.margins(x=0.3)
        else:
            panel.set(xlabel=along, ylabel="recall@1, %")
            panel.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def curves(rows: list[Row], along: str) -> dict[str, dict[Any, list[float]]]:
    """Label -> place on the axis -> a value for each seed; the place None is the whole axis."""
    found: dict[str, dict[Any, list[float]]] = defaultdict(dict)
    for row in rows:
        rest = ", ".join(f"{axis} {value}" for axis, value in row.point.items() if axis != along)
        if along == "arm":
            if row.gains:
                found[rest][row.arm] = list(row.gains.values())
        elif along in row.point:
            found[f"{row.arm}{f' ({rest})' if rest else ''}"][row.point[along]] = row.values
        elif row is rows[0]:
            found[row.arm][None] = row.values
    return found


def main(arguments: list[str], results: Path) -> None:
    """Print tables of a file of results, and draw a plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pays table", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=results, help="file of results")
    parser.add_argument("--matrix", help="only this one")
    parser.add_argument("--data", nargs="+", help="only these data sets")
    parser.add_argument("--arms", nargs="+", help="only these arms; the first of the matrix has to be among them")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a .png or .svg")
    parser.add_argument("--along", default="batch", help="the axis of the plot, or the word arm")
    args = parser.parse_args(arguments)
    lines = [
        line
        for line in recorded_lines(args.out)
        if args.matrix in (None, line["matrix"])
        and (args.data is None or line["data"] in args.data)
        and (args.arms is None or line["arm"] in args.arms)
    ]
    if not lines:
        raise SystemExit(f"{args.out} has no run{f' of {args.matrix}' if args.matrix else ''}")
    try:
        print(tables(lines))
        if args.plot:
            plot(lines, args.along, args.plot)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
