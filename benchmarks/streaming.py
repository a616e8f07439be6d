"""Training from shards read front to back against training by the index: the same data, configuration and seeds, recall@1 of both.

    dnc-dist data prepare glyphs --image-size 16 --out data/glyphs16
    python -m benchmarks.streaming benchmarks/matrices/published_clusters.yaml --data data/glyphs16 --set data.image_size=16

Appends one JSON line per run to benchmarks/results/streaming.jsonl and prints mean and standard deviation over the seeds. Runs lie in
--runs and are resumed, so that the script can be stopped and started again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.division import train
from benchmarks.record import RESULTS, append, machine


def main() -> None:
    """Run both with every seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/streaming"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    reached: dict[str, list[float]] = {"indexed": [], "stream": []}
    for seed in range(args.seeds):
        for access, values in reached.items():
            line = train(args.config, seed, args.data, args.runs / access, [*args.overrides, f"data.access={access}"])
            values.append(list(line["recall@1"].values())[-1])
            append(RESULTS / "streaming.jsonl", {"access": access, **line, **machine()})
            print(f"seed {seed}, {access}: recall@1 {values[-1]:.2f} after {line['samples_seen']:,} images", flush=True)
    for access, values in reached.items():
        print(f"{access}: recall@1 {statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}")


if __name__ == "__main__":
    main()
