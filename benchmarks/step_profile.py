"""Where the time of a training step goes: `python -m benchmarks.step_profile --out FOLDER` writes a table and a trace of torch's profiler.

The step is the one of `benchmarks.step`. `step.txt` lists operators and kernels by their own time, `step.json` opens in
https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.batches import random_batch
from benchmarks.step import BACKBONES, configuration, engine_step
from dnc_dist.processes import distributed

WARM_UP, ROWS_OF_TABLE = 5, 40


def main() -> None:
    """Profile some steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for table and trace")
    parser.add_argument("--backbone", choices=list(BACKBONES), default="conv4")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    distributed.init()
    rows, size = BACKBONES[args.backbone]
    step = engine_step(configuration(args.backbone, rows, size), random_batch(rows, size).to(distributed.device()), deepspeed=False)
    for number in range(min(WARM_UP, args.steps)):
        step(number)
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        for number in range(args.steps):
            step(number)
        if cuda:
            torch.cuda.synchronize()
    args.out.mkdir(parents=True, exist_ok=True)
    table = profiler.key_averages().table(sort_by=f"self_{'device' if cuda else 'cpu'}_time_total", row_limit=ROWS_OF_TABLE)
    (args.out / "step.txt").write_text(table, encoding="utf-8")
    profiler.export_chrome_trace(str(args.out / "step.json"))
    print(table)
    distributed.shutdown()


if __name__ == "__main__":
    main()
