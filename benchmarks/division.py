"""One learner against several, at the same number of samples seen: every configuration with every seed, some runs at a time.

    python -m benchmarks.division configs/glyph64_one.yaml configs/glyph64_divided.yaml --data data/glyph64 --seeds 3 --jobs 2

Appends one JSON line per run to benchmarks/results/division.jsonl (metrics by epoch, machine, versions, commit) and prints mean and
standard deviation over the seeds. Runs lie in --runs and are resumed, so that the script can be stopped and started again.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import training
from benchmarks.record import RESULTS, append, machine


def train(config: Path, seed: int, data: Path, runs: Path, overrides: list[str]) -> dict[str, Any]:
    """Train one configuration with one seed on one core; what it reached, epoch by epoch."""
    trained = training.train(config, f"{config.stem}-seed{seed}", runs, [f"data.root={data}", f"run.seed={seed}", *overrides])
    return {
        "config": config.stem,
        "seed": seed,
        "overrides": overrides,
        "recall@1": {str(epoch): value for epoch, value in trained.percent("recall@1").items()},
        "map@r": round(100 * trained.result["map@r"], 2),
        "samples_seen": trained.result["samples_seen"],
    }


def main() -> None:
    """Run the matrix."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--runs", type=Path, default=Path("runs/division"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    jobs = [(config, seed) for seed in range(args.seeds) for config in args.configs]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda job: train(*job, args.data, args.runs, args.overrides), jobs))
    for line in found:
        append(RESULTS / "division.jsonl", {**line, **machine()})
    for config in args.configs:
        lines = [line for line in found if line["config"] == config.stem]
        for epoch in lines[0]["recall@1"]:
            values = [line["recall@1"][epoch] for line in lines]
            print(f"{config.stem}: recall@1 after {epoch} epochs {training.cell(values)} ({len(values)} seeds)")


if __name__ == "__main__":
    main()
