"""Does dividing pay? Runs a declared matrix, and makes tables and a plot of what it found.

    python -m benchmarks.pays benchmarks/matrices/a_hardness.yaml            # choose, on validation classes
    python -m benchmarks.pays benchmarks/matrices/a_hardness.yaml --final    # the declared final arms, on test classes
    python -m benchmarks.pays table --matrix a-hardness --plot along.svg --along batch

A matrix (benchmarks/pays_matrix.py has its keys) states its question and its prediction, or it is refused; so are configurations that
do not exist, before anything is run. All arms see the same number of images. A run is a process with one core for each rank; when it is
complete, it is one line of --out. What has a line is not run again, and what was interrupted begins anew. --list shows what is done.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from benchmarks import pays_table
from benchmarks.pays_matrix import Matrix, Planned, load_matrix, plan_runs
from benchmarks.record import RESULTS, ROOT, append, machine, recorded_lines
from benchmarks.training import Trained, train
from dnc_dist.base.errors import InputError

OUT = RESULTS / "pays.jsonl"
_OF_A_DIVISION = ("epoch", "num_learners", "left_out", "matched_share", "seconds")


def is_recorded(run: Planned, lines: list[dict[str, Any]]) -> bool:
    """Whether a run has its line: the same place in the matrix with the same overrides."""
    return any(all(line[key] == value for key, value in run.where.items()) and line["overrides"] == run.overrides for line in lines)


def select(runs: list[Planned], at: list[str], data: list[str] | None) -> list[Planned]:
    """The part of a matrix that has these values on its axes (``AXIS=VALUE``; a run without the axis stays) and is of these data sets.

    Raises:
        InputError: no run is left.
    """
    allowed: dict[str, set[str]] = {}
    for entry in at:
        axis, _, value = entry.partition("=")
        allowed.setdefault(axis, set()).add(value)
    chosen = [
        run
        for run in runs
        if (data is None or run.data in data) and all(str(value) in allowed.get(axis, {str(value)}) for axis, value in run.point.items())
    ]
    unknown = allowed.keys() - {axis for run in runs for axis in run.point}
    if unknown or not chosen:
        points = sorted({f"{axis}={value}" for run in runs for axis, value in run.point.items()})
        raise InputError(
            f"no run has {' '.join(at)} {data or ''}; there are {', '.join(points)}, data {sorted({run.data for run in runs})}"
        )
    return chosen


def line_of(run: Planned, matrix: Matrix, trained: Trained) -> dict[str, Any]:
    """What is recorded of a run."""
    split, metric = ("test", "recall@1") if run.final else ("validation", "validation/recall@1")
    by_epoch = trained.percent(metric)
    divisions = [{key: line[key] for key in _OF_A_DIVISION} for line in trained.lines if line["kind"] == "division"]
    cosines = [line["mask_orthogonality"] for line in trained.lines if "mask_orthogonality" in line]
    return run.where | {
        "config": str(matrix.config),
        "overrides": run.overrides,
        "digest": run.digest,
        "prediction": hashlib.sha256(matrix.prediction.encode()).hexdigest()[:12],
        "split": split,
        "recall@1": by_epoch[max(by_epoch)],
        "by_epoch": {str(epoch): value for epoch, value in by_epoch.items()},
        "map@r": trained.percent(metric.replace("recall@1", "map@r"))[max(by_epoch)],
        "samples_seen": trained.result["samples_seen"],
        "epochs": run.cfg.schedule.epochs,
        "cpu_seconds": trained.cpu_seconds,
        "seconds": trained.seconds,
        "divisions": divisions,
        "mask_cosine": cosines[-1] if cosines else None,
    }


def run_matrix(matrix: Matrix, runs: list[Planned], out: Path, folder: Path, *, jobs: int, processes: int, nice: int) -> None:
    """Train what has no line yet; each run is recorded as soon as it is complete."""
    lines = recorded_lines(out)
    left = [run for run in runs if not is_recorded(run, lines)]
    print(f"{matrix.name}: {len(runs)} runs, {len(runs) - len(left)} recorded, {len(left)} to do", flush=True)
    lock = Lock()

    def work(run: Planned) -> None:
        shutil.rmtree(folder / run.name, ignore_errors=True)  # of an attempt that was interrupted: its CPU seconds are not known
        trained = train(ROOT / matrix.config, run.name, folder, run.overrides, processes=processes, nice=nice)
        line = line_of(run, matrix, trained) | {"processes": processes} | machine()
        with lock:
            append(out, line)
            print(
                f"{run.data}, {run.arm} {run.point} seed {run.seed}: {line['recall@1']:.2f} ({line['cpu_seconds']:.0f} CPU s)", flush=True
            )

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, left))


def main() -> None:
    """Run a matrix, or print tables."""
    if sys.argv[1:2] == ["table"]:
        pays_table.main(sys.argv[2:], OUT)
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("matrix", type=Path, help="the declaration, or the word table")
    parser.add_argument("--out", type=Path, default=OUT, help="file of results, a JSON line for each run")
    parser.add_argument("--runs", type=Path, default=Path("runs/pays"), help="folder of the runs")
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--at", nargs="+", metavar="AXIS=VALUE", default=[], help="only runs with one of these values: batch=32 batch=64")
    parser.add_argument("--data", nargs="+", help="only these data sets of the matrix")
    parser.add_argument("--final", action="store_true", help="the arms declared final: all training classes, measured on test classes")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--processes", type=int, default=1, help="ranks of a run, a core each")
    parser.add_argument("--nice", type=int, default=10, help="how much other programs go before, 0 to 19")
    parser.add_argument("--list", action="store_true", help="show the runs and what is done, and run nothing")
    args = parser.parse_args()
    try:
        matrix = load_matrix(args.matrix)
        runs = select(plan_runs(matrix, final=args.final, arms=args.arms), args.at, args.data)
        if args.list:
            lines = recorded_lines(args.out)
            for run in runs:
                print("done" if is_recorded(run, lines) else "    ", run.digest, run.data, run.arm, run.point, f"seed {run.seed}")
            return
        print(f"{matrix.question.strip()}\nprediction: {matrix.prediction.strip()}")
        run_matrix(matrix, runs, args.out, args.runs, jobs=args.jobs, processes=args.processes, nice=args.nice)
        print(pays_table.tables([line for line in recorded_lines(args.out) if line["matrix"] == matrix.name]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
