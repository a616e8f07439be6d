"""A model of step and division time on 1 to 1024 GPUs, and what becomes the bottleneck first. A prediction, not a measurement.

    python -m benchmarks.scaling --measure configs/vehicleid.yaml --measured gpu.json     # on one GPU: time the parts, keep them
    python -m benchmarks.scaling --measured gpu.json [--network network.yaml] [--images 10000000] [--json]

Measured: the times of one device. Counted: the bytes, by the formulas that tests compare with the counter of the collectives.
Assumed: the network, unless a YAML file with the names of `Network` says otherwise, storage, and the share of hidden gradient sums.
Modelled: every time that stands in a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks import record
from benchmarks.scaling_model import (
    Measured,
    Network,
    StepTimes,
    Workload,
    division,
    division_bytes,
    evaluation,
    gradient_bytes,
    step,
    step_bytes,
)

RANKS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
BOTTLENECK = 0.1  # of the efficiency: a phase that costs so much is called one
COME_FROM = {
    "rows": "measured: a step but for loss and optimizer, by the row",
    "launches": "measured: a step but for loss and optimizer, without rows",
    "loss": "measured on one device with the rows of up to 16 ranks, extrapolated: mining and loss",
    "gathers": "counted bytes and messages over the assumed network: z, labels and drawn pairs",
    "stats": "counted bytes and messages over the assumed network",
    "gradients": "bytes and messages of DeepSpeed over the assumed network, less what the backward pass is assumed to hide",
    "optimizer": "measured: gradient norm, clipping and update, divided by the ranks from ZeRO 1 on",
    "engine": "measured on one process: what DeepSpeed's engine adds, which several processes run; its update is divided, too",
    "stragglers": "spread of the measured steps: what the slowest rank takes longer, if ranks are slow independently of each other",
    "input": "measured decoding, assumed workers and storage; only what exceeds the rest",
    "extraction": "measured images per second of one device",
    "init": "counted bytes over the assumed network, and measured k-means++ on the sample",
    "lloyd": "measured time of a row in one iteration",
    "lloyd sums": "counted bytes over the assumed network",
    "ids": "counted bytes over the assumed network",
    "bookkeeping": "measured time of a row in match and class counts, which every rank does for all rows",
    "search": "measured time of a query and a gallery row",
    "exchange": "counted bytes over the assumed network",
}


@dataclass(frozen=True)
class Prediction:
    """Seconds by phase at each number of ranks, and on one rank. `grows`: the work grows with the ranks (weak scaling)."""

    name: str
    one: dict[str, float]
    seconds: dict[int, dict[str, float]]
    grows: bool

    def efficiency(self, ranks: int) -> float:
        """Seconds that as many ideal ranks would take, over those of the model."""
        return sum(self._ideal(ranks).values()) / sum(self.seconds[ranks].values())

    def bottleneck(self, ranks: int) -> tuple[str, float]:
        """The phase that costs most efficiency, and how much: the losses of all phases add up to what is missing."""
        phases, ideal = self.seconds[ranks], self._ideal(ranks)
        name = max(phases, key=lambda phase: phases[phase] - ideal[phase])
        return name, (phases[name] - ideal[name]) / sum(phases.values())

    def first(self) -> tuple[int, str, float] | None:
        """Ranks from which on a phase is called a bottleneck, which one, and its loss there; None: there is none."""
        found = ((ranks, *self.bottleneck(ranks)) for ranks in sorted(self.seconds))
        return next((line for line in found if line[2] >= BOTTLENECK), None)

    def _ideal(self, ranks: int) -> dict[str, float]:
        """Seconds by phase of ranks that send nothing, share all work evenly and never wait for images."""
        return {phase: 0.0 if phase == "input" else seconds / (1 if self.grows else ranks) for phase, seconds in self.one.items()}


def predict(work: Workload, measured: Measured, network: Network, ranks: tuple[int, ...] = RANKS) -> list[Prediction]:
    """Weak scaling (so many rows a GPU) and strong scaling (so many rows a step), division and evaluation."""

    def table(name: str, phases: Callable[[int], dict[str, float]], grows: bool) -> Prediction:
        return Prediction(name, phases(1), {w: phases(w) for w in ranks}, grows)

    return [
        table(
            f"step, weak scaling: {work.rows_per_gpu} rows a GPU",
            lambda w: step(work, measured, network, w, work.rows_per_gpu * w),
            True,
        ),
        table(f"step, strong scaling: {work.batch} rows in all", lambda w: step(work, measured, network, w, work.batch), False),
        table(f"division of {work.images:,} images", lambda w: division(work, measured, network, w), False),
        table(
            f"evaluation: {work.queries:,} queries, gallery of {work.gallery:,}", lambda w: evaluation(work, measured, network, w), False
        ),
    ]


def bytes_received(work: Workload, measured: Measured, ranks: int) -> dict[str, float]:
    """What one rank receives in one step of weak scaling and in one division."""
    loss, sizes = step_bytes(work, ranks, work.rows_per_gpu), division_bytes(work, measured.features)
    share = (ranks - 1) / ranks
    division_once = share * (sizes["features"] + sizes["sample"] + sizes["ids"] + sizes["broadcast"])
    return {
        "loss gathers": loss["gather"],
        "stats": loss["reduce"],
        **gradient_bytes(work, measured.step.parameters, ranks),
        "division, once": division_once,
        "division, an iteration": 2 * share * sizes["iteration"],
    }


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def _size(size: float) -> str:
    unit = next((unit for unit in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= unit[1]), ("B", 1))
    return f"{size / unit[1]:.3g} {unit[0]}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table of cells, each column to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def show(work: Workload, measured: Measured, network: Network, predictions: list[Prediction]) -> str:
    """The report: what it stands on, and a table of each prediction."""
    parts = [
        f"Measured on one {measured.device}: {measured.step.parameters / 1e6:.1f} million parameters, {measured.features} features, "
        f"extraction {measured.images_per_second:,.0f} images/s, a loader process {measured.decoded_per_second:,.0f} images/s.",
        "Assumed: "
        + ", ".join(f"{name}={value:g}" for name, value in asdict(network).items() if value is not None)
        + f", {work.loader_workers} loader processes a GPU, {work.overlap:.0%} of the backward pass hides sums of gradients."
        + ("" if network.storage else " Images lie on each node's own disk."),
        "Everything below is modelled. No run on several GPUs stands behind it. Steps of two processes on two CPU "
        "cores, measured after they were predicted, were predicted between 27 % too low and 11 % too high "
        "(python -m benchmarks.scaling_check, docs/scale.md).",
    ]
    for prediction in predictions:
        names = list(next(iter(prediction.seconds.values())))
        lines = [["GPUs", *names, "in all", "efficiency", "lost most by"]]
        for ranks, phases in prediction.seconds.items():
            name, lost = prediction.bottleneck(ranks)
            total = sum(phases.values())
            efficiency = f"{100 * prediction.efficiency(ranks):.0f} %"
            lines.append(
                [str(ranks), *map(_time, phases.values()), _time(total), efficiency, f"{name} {100 * lost:.0f} %" if lost > 0 else "-"]
            )
        first = prediction.first()
        note = "no phase costs 10 % of the efficiency"
        if first is not None:
            note = f"{first[1]}, from {first[0]} GPUs on (it costs {100 * first[2]:.0f} % of the efficiency there)"
        parts.append(f"{prediction.name}\n{aligned(lines)}\nfirst bottleneck: {note}")
    received = {ranks: bytes_received(work, measured, ranks) for ranks in predictions[0].seconds}
    lines = [["GPUs", *next(iter(received.values()))], *([str(ranks), *map(_size, sizes.values())] for ranks, sizes in received.items())]
    parts.append(f"bytes that one rank receives: counted, but for those of DeepSpeed\n{aligned(lines)}")
    shown = {name for prediction in predictions for phases in prediction.seconds.values() for name in phases}
    parts.append("\n".join(f"{name}: {meaning}" for name, meaning in COME_FROM.items() if name in shown))
    return "\n\n".join(parts)


def read_network(path: Path | None) -> Network:
    """The assumptions, with the values of a YAML file instead where it has some."""
    values: dict[str, Any] = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path else {}
    known = {field.name for field in fields(Network)}
    if unknown := sorted(set(values) - known):
        sys.exit(f"{path}: unknown {', '.join(unknown)}; allowed are {', '.join(sorted(known))}")
    for name, value in values.items():
        values[name] = float(value) if isinstance(value, str) else value  # YAML takes 45e9 for text
    return Network(**values)


def read_measured(path: Path) -> tuple[Measured, Workload]:
    """What `--measure` has written: times, and the work that they belong to."""
    values = json.loads(path.read_text(encoding="utf-8"))
    measured = values["measured"]
    return Measured(**measured | {"step": StepTimes(**measured["step"])}), Workload(**values["work"])


def _measure(args: argparse.Namespace) -> None:
    from benchmarks.scaling_measure import measure, workload
    from dnc_dist.config import load_config
    from dnc_dist.processes import distributed

    cfg = load_config(args.measure, ["data.root=unused", "model.weights=none", *args.overrides])
    distributed.init()
    found = measure(cfg, args.rows, calls=args.calls, steps=args.steps, size=args.size)
    kept = {"measured": asdict(found), "work": asdict(workload(cfg)), "config": str(args.measure), **record.machine()}
    args.measured.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    distributed.shutdown()
    print(f"measured on one {found.device}, kept in {args.measured}", file=sys.stderr)


def main() -> None:
    """Measure if asked to, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measured", type=Path, required=True, metavar="FILE", help="times of one device (JSON)")
    parser.add_argument("--measure", type=Path, metavar="CONFIG", help="first time this configuration here, and write FILE")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128], help="with --measure: batches to time")
    parser.add_argument("--steps", type=int, default=40, help="with --measure: training steps of each batch")
    parser.add_argument("--calls", type=int, default=5, help="with --measure: calls of anything else, of which the median counts")
    parser.add_argument("--size", type=int, default=65_536, help="with --measure: rows for k-means and search")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="with --measure")
    parser.add_argument("--network", type=Path, metavar="YAML", help="what is known of the network")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--json", action="store_true")
    work_options = parser.add_argument_group("the work", "as the measured configuration has it, unless given here")
    allowed = {"loss": ("margin", "proxy_anchor"), "zero": (0, 1, 2)}
    for field in fields(Workload):
        option = f"--{field.name.replace('_', '-')}"
        work_options.add_argument(option, type=type(field.default), choices=allowed.get(field.name), help=f"default {field.default}")
    args = parser.parse_args()
    if args.measure:
        _measure(args)
    if not args.measured.exists():
        parser.error(f"{args.measured} does not exist; write it with --measure CONFIG on a machine with one of the GPUs")
    measured, work = read_measured(args.measured)
    work = replace(work, **{field.name: value for field in fields(Workload) if (value := getattr(args, field.name)) is not None})
    network = read_network(args.network)
    predictions = predict(work, measured, network, tuple(args.ranks))
    if not args.json:
        print(show(work, measured, network, predictions))
        return
    answer: dict[str, Any] = {
        "measured": asdict(measured),
        "assumed": {"network": asdict(network), "workload": asdict(work)},
        "counted": {w: bytes_received(work, measured, w) for w in args.ranks},
        "modelled": [
            {"name": p.name, "seconds": p.seconds, "efficiency": {w: p.efficiency(w) for w in p.seconds}, "first_bottleneck": p.first()}
            for p in predictions
        ],
        "come_from": COME_FROM,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
