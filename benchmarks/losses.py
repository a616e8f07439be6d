"""Every loss with one learner and with division, on the same images and the same number of samples seen.

    python -m benchmarks.losses --data data/glyph64 --seeds 3

Each loss has the options that its paper recommends (its defaults); learning rates are the same for all. Nothing is chosen by what the
runs reach. Appends one JSON line per run to benchmarks/results/losses.jsonl and prints a Markdown table of recall@1 on the test classes
after the last epoch. Runs lie in --runs; those that are complete are neither trained nor recorded again.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.division import train
from benchmarks.record import RESULTS, ROOT, append, machine, recorded_lines
from benchmarks.training import cell
from dnc_dist.base.parts import TABLE

FILE = RESULTS / "losses.jsonl"
ARMS = {"one learner": "glyph64_one", "1 → 2 → 4 learners, conquer": "glyph64_divided"}
# Six epochs: a division at the start of each of the first three that follow the first, from the fifth on the whole embedding.
BUDGET = ["schedule.epochs=6", "evaluation.every=6"]
DIVIDED = ["division.every=1", "division.conquer_from=4"]
# Proxies and class weights start at random and learn at a rate of their own: 1e-2, as with the authors of proxy_anchor and soft_triple.
OPTIONS = {loss: ["optim.loss_lr_mult=10"] for loss in ("proxy_anchor", "arcface", "soft_triple")}


def main() -> None:
    """Run the matrix."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--losses", nargs="+", default=[name for name in TABLE["loss"] if name != "pml"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--runs", type=Path, default=Path("runs/losses"))
    args = parser.parse_args()
    jobs = [(seed, loss, arm) for seed in range(args.seeds) for loss in args.losses for arm in ARMS]

    recorded = [(line["loss"], line["arm"], line["seed"], line["overrides"]) for line in recorded_lines(FILE)]

    def run(job: tuple[int, str, str]) -> float:
        seed, loss, arm = job
        overrides = [f"loss.name={loss}", *BUDGET, *OPTIONS.get(loss, []), *(DIVIDED if arm != "one learner" else [])]
        line = train(ROOT / "configs" / f"{ARMS[arm]}.yaml", seed, args.data, args.runs / loss, overrides)
        if (loss, arm, seed, overrides) not in recorded:
            append(FILE, {"loss": loss, "arm": arm, **line, **machine()})
        return float(list(line["recall@1"].values())[-1])

    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(jobs, pool.map(run, jobs), strict=True))
    print(f"| loss | {' | '.join(ARMS)} |\n|---|{'---|' * len(ARMS)}")
    for loss in args.losses:
        print(f"| {loss} | {' | '.join(cell([found[seed, loss, arm] for seed in range(args.seeds)]) for arm in ARMS)} |")


if __name__ == "__main__":
    main()
