"""What the model of scaling predicts for several ranks on this machine, beside what they are then measured to take.

    nice -n -15 python -m benchmarks.scaling_check [CONFIG] --ranks 2 --out benchmarks/results/scaling.jsonl

Each rank has one thread and one core; gloo over the loopback, DeepSpeed's engine, batches that are there (no loader), BatchNorm frozen.
First the step of one process and the network of the ranks are measured, and the prediction is printed. Then steps of the ranks are
measured: weak scaling (every rank has the rows of the one process) and strong scaling (they share these). Steps of one process, and of as
many unrelated processes as there are ranks, side by side, take turns with them. How much slower these are is what processes take from each
other in caches and memory. The model knows nothing of that, since each GPU has its own.

Without a CONFIG: conv4 at 32 pixels and resnet18 at 64.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks import record
from benchmarks.scaling import aligned
from benchmarks.scaling_measure import workload
from benchmarks.scaling_model import Network, StepTimes, step_without_input
from benchmarks.scaling_ranks import Processes, StepSeconds
from benchmarks.step import configuration
from dnc_dist.config import RunConfig, load_config

PROBLEMS = {"conv4": (128, 32), "resnet18": (32, 64)}
"""Rows of the one process, and pixels."""
PARTS = {
    "computing": ("rows", "launches", "loss", "optimizer", "engine"),
    "collectives of the loss": ("gathers", "stats"),
    "collectives of the engine": ("gradients",),
    "waiting for the slowest": ("stragglers",),
}
"""Phases of the model that can be told apart in a measured step. The rank that comes to a collective last only sends; others wait, too."""
NETWORK_ROUNDS = 3


def check(cfg: RunConfig, rows: int, ranks: int, *, steps: int, rounds: int) -> dict[str, Any]:
    """Measure one process and the network, predict, measure the ranks, print it all.

    Args:
        cfg: what is trained; its data is not read.
        rows: of the one process, and of each rank in weak scaling.
        ranks: how many.
        steps: of one process that the prediction stands on, for each number of rows; and of each arm, in all rounds together.
        rounds: in which the arms take turns.
    """
    alone, together = Processes(ranks, cfg, together=False), Processes(ranks, cfg, together=True)
    arms = {"weak": rows, "strong": rows // ranks}
    times: StepTimes = alone.ask("times", sorted(arms.values()), 7, steps, of=1)[0]
    found = [together.ask("network")[0] for _ in range(NETWORK_ROUNDS)]
    collectives = [(same[0][0], same[0][1], statistics.median(seconds for *_, seconds in same)) for same in zip(*found, strict=True)]
    network, work = fit_network(collectives, ranks), replace(workload(cfg), overlap=0.0)
    predicted = {arm: step_without_input(work, times, network, ranks, each * ranks) for arm, each in arms.items()}
    one = {arm: sum(step_without_input(work, times, network, 1, each).values()) for arm, each in arms.items()}
    steps_of_one = ", ".join(f"{b} rows {1e3 * seconds:.1f} ms" for b, seconds in times.steps)
    print(f"one process: {steps_of_one}; DeepSpeed's engine {1e3 * times.engine:.1f} ms more")
    print(f"network: {1e6 * network.node_latency:.0f} µs an all-reduce, {network.nvlink / 1e9:.2f} GB/s")
    for arm, phases in predicted.items():
        shown = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in phases.items())
        print(f"predicted, {arm}: {1e3 * sum(phases.values()):.1f} ms ({shown})", flush=True)
    taken: dict[str, list[list[list[StepSeconds]]]] = {f"{kind}, {arm}": [] for kind in ("ranks", "one", "side by side") for arm in arms}
    for _ in range(rounds):
        for arm, each in arms.items():
            asked = each, max(1, steps // rounds)
            taken[f"one, {arm}"].append(alone.ask("steps", *asked, of=1))
            taken[f"side by side, {arm}"].append(alone.ask("steps", *asked))
            taken[f"ranks, {arm}"].append(together.ask("steps", *asked))
    alone.close()
    together.close()
    measured = {arm: _summary(blocks) for arm, blocks in taken.items()}
    answer = {
        "one_process": asdict(times),
        "collectives": collectives,
        "network": asdict(network),
        "predicted": predicted,
        "predicted_one": one,
        "measured": measured,
        "slowdown": {arm: _slowdown(measured[f"side by side, {arm}"], measured[f"one, {arm}"]) for arm in arms},
    }
    for arm, each in arms.items():
        print(_table(answer, arm, each), flush=True)
    return answer


def fit_network(collectives: Sequence[tuple[str, int, float]], ranks: int) -> Network:
    """The network of one node that explains best, by relative error, what collectives took.

    Args:
        collectives: of each its operation ("all-reduce" or "all-gather"), bytes of the whole result, seconds.
        ranks: that took part, all on one machine.
    """
    share = (ranks - 1) / ranks
    # As in `all_reduce` and `all_gather`: what the latency and a byte count for.
    counts = np.array([(1.0, 2 * share * size) if kind == "all-reduce" else (0.5, share * size) for kind, size, _ in collectives])
    seconds = np.array([seconds for *_, seconds in collectives])
    # Divided by its seconds, each line says which part of them the fit explains. Bytes in millions, so that both columns weigh alike.
    (latency, million), _ = nnls(counts * [1, 1e-6] / seconds[:, None], np.ones_like(seconds))
    return Network(gpus_per_node=ranks, nvlink=1e6 / float(million), node_latency=float(latency), storage=None)


def _summary(rounds: list[list[list[StepSeconds]]]) -> dict[str, Any]:
    """Medians over all steps, of the processes' mean and, in collectives, of the one that was there last; whole steps also by round.

    Args:
        rounds: of each, by process, the steps.
    """
    steps = [[_mean(step) for step in zip(*processes, strict=True)] for processes in rounds]
    every = [step for of_round in steps for step in of_round]
    parts = {part: statistics.median(step[part] for step in every) for part in every[0]}
    by_round = [statistics.median(step["total"] for step in of_round) for of_round in steps]
    return parts | {"mean": statistics.fmean(step["total"] for step in every), "rounds": by_round}


def _mean(step: Sequence[StepSeconds]) -> dict[str, float]:
    """The parts of one step, which several processes have taken."""
    total, loss, engine = (statistics.fmean(values) for values in zip(*step, strict=True))
    sent = min(one.loss_collectives for one in step), min(one.engine_collectives for one in step)
    names = ("total", *PARTS)
    return dict(zip(names, (total, total - loss - engine, *sent, loss + engine - sum(sent)), strict=True))


def _slowdown(side_by_side: dict[str, Any], one: dict[str, Any]) -> float:
    """Median over the rounds: what comes right after another is met by the same other work on the machine."""
    return statistics.median(many / few for many, few in zip(side_by_side["rounds"], one["rounds"], strict=True))


def _table(answer: dict[str, Any], arm: str, rows: int) -> str:
    """Predicted beside measured."""
    phases, measured, slowdown = answer["predicted"][arm], answer["measured"][f"ranks, {arm}"], answer["slowdown"][arm]
    parts = {part: sum(phases[name] for name in names) for part, names in PARTS.items()}
    total = sum(parts.values())
    lines = [["milliseconds", "predicted", "measured", "error"]]
    lines += [_line(part, seconds, measured[part]) for part, seconds in parts.items()]
    lines.append(_line("step", total, measured["total"]))
    contended = total + (slowdown - 1) * (parts["computing"] + parts["waiting for the slowest"])
    lines.append(_line(f"step, computing x {slowdown:.2f} (side by side)", contended, measured["total"]))
    one, predicted_one = answer["measured"][f"one, {arm}"], answer["predicted_one"][arm]
    lines.append(_line("one process, in the same rounds", predicted_one, one["total"]))
    lines.append(_line("step, in steps of one process", total / predicted_one, measured["total"] / one["total"], "{:.2f}"))
    spread = ", ".join(f"{name} {_range(values['rounds'])}" for name, values in (("ranks", measured), ("one process", one)))
    mean = f"mean of the ranks' steps {1e3 * measured['mean']:.1f}"
    return f"\n{arm} scaling, {rows} rows a rank\n{aligned(lines)}\nmedians of rounds, ms: {spread}; {mean}"


def _line(name: str, predicted: float, measured: float, form: str = "") -> list[str]:
    """Cells of a row: of seconds in milliseconds, unless another form is given."""
    shown = [form.format(each) if form else f"{1e3 * each:.1f}" for each in (predicted, measured)]
    return [name, *shown, f"{100 * (predicted / measured - 1):+.1f} %"]


def _range(seconds: Iterable[float]) -> str:
    values = sorted(1e3 * each for each in seconds)
    return f"{values[0]:.1f} to {values[-1]:.1f}"


def main() -> None:
    """Check each problem and keep a line of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "config", type=Path, nargs="?", metavar="CONFIG", help="what is trained, with as many rows as its schedule.batch_size"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=36, help="of one process, and then of each arm")
    parser.add_argument("--rounds", type=int, default=6, help="in which the arms take turns")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="of CONFIG")
    parser.add_argument("--out", type=Path, help="file of results to which a line for each problem is added")
    args = parser.parse_args()
    if args.ranks < 2:
        parser.error("one rank waits for nobody: give --ranks 2 or more")
    if args.config:
        cfg = load_config(args.config, ["data.root=unused", "model.weights=none", "model.batch_norm=frozen", *args.overrides])
        problems = [(cfg, cfg.schedule.batch_size)]
    else:
        problems = [(configuration(name, rows, size, batch_norm="frozen"), rows) for name, (rows, size) in PROBLEMS.items()]
    for cfg, rows in problems:
        if rows % (args.ranks * cfg.schedule.samples_per_class):
            parser.error(f"{rows} rows cannot be shared evenly by {args.ranks} ranks with whole classes")
        problem = {"backbone": cfg.model.backbone.name, "rows": rows, "image_size": cfg.data.image_size, "ranks": args.ranks}
        where = record.machine()
        print(f"\n{problem}, load {where['load_before']}")
        found = check(cfg, rows, args.ranks, steps=args.steps, rounds=args.rounds)
        if args.out:
            record.append(
                args.out, {"problem": problem | {"steps": args.steps, "rounds": args.rounds, "zero": cfg.engine.zero}, **found, **where}
            )


if __name__ == "__main__":
    main()
