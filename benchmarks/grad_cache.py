"""Memory and time of one training step on a large batch, with the rows in one part and in several (`engine.grad_cache_chunks`).

    python -m benchmarks.grad_cache --batch-size 2048 --chunks 1 4 16 --out benchmarks/results/grad_cache.jsonl

Every number of chunks is a process of its own, which builds the objective, computes loss and gradient of one step on random images, and
tells the most memory that it ever had, that before the step, and the seconds. Ends with exit code 1 if the losses or gradients differ by
more than the rounding of fp32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.batches import PER_CLASS, random_batch
from dnc_dist.config import parse_tree
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_objective

MB = 1e6
# Sums over a batch in another order; a lost or doubled chunk changes 6 % of a gradient at least.
ALLOWED = 1e-3


def _memory(name: str) -> float:
    """MB that /proc knows of this process: "VmRSS" now, "VmHWM" the most ever."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024 / MB


def measure(chunks: int, batch_size: int, backbone: str, image_size: int) -> dict[str, Any]:
    """Memory, seconds, loss and norm of the gradient of one step of this process."""
    tree = {
        "data": {"root": ".", "image_size": image_size, "augment": "none"},
        "model": {"backbone": backbone, "weights": "none", "batch_norm": "frozen", "embedding_dim": 128},
        "schedule": {"batch_size": batch_size, "samples_per_class": PER_CLASS},
        "engine": {"precision": "fp32", "grad_cache_chunks": chunks},
    }
    num_classes = batch_size // PER_CLASS
    objective = build_objective(parse_tree(tree, "benchmark"), num_classes).train()
    batch = random_batch(batch_size, image_size)
    before, started = _memory("VmRSS"), time.monotonic()
    loss, _ = objective(batch, Phase(step=0, level=1, conquer=False, backbone_frozen=False))
    loss.backward()
    seconds = time.monotonic() - started
    gradient = torch.cat([value.grad.flatten() for value in objective.parameters() if value.grad is not None])
    return {
        "chunks": chunks,
        "peak_mb": round(_memory("VmHWM")),
        "before_mb": round(before),
        "seconds": round(seconds, 1),
        "loss": loss.item(),
        "gradient_norm": gradient.norm().item(),
    }


def main() -> None:
    """Run one process for each number of chunks, one after another, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--backbone", default="conv4")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--out", type=Path, help="file of results to which a line is added")
    parser.add_argument("--alone", action="store_true", help="measure in this process, and print JSON")
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args.chunks[0], args.batch_size, args.backbone, args.image_size)))
        return
    where = record.machine()
    problem = {"batch_size": args.batch_size, "backbone": args.backbone, "image_size": args.image_size}
    found = []
    print(f"{'chunks':>6} {'peak MB':>8} {'of these the step':>18} {'seconds':>8}")
    for chunks in args.chunks:
        options = [text for name, value in problem.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "benchmarks.grad_cache", "--alone", "--chunks", str(chunks), *options]
        done = subprocess.run(command, cwd=record.ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        last = found[-1]
        print(f"{chunks:>6} {last['peak_mb']:>8} {last['peak_mb'] - last['before_mb']:>18} {last['seconds']:>8}")
    if args.out:
        record.append(args.out, {"problem": problem, "steps": found, "threads": torch.get_num_threads(), **where})
    for name in ("loss", "gradient_norm"):
        if any(abs(line[name] / found[0][name] - 1) > ALLOWED for line in found):
            raise SystemExit(f"{name} depends on the number of chunks: {[line[name] for line in found]}")


if __name__ == "__main__":
    main()
