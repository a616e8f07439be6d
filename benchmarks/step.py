"""The training step of one process beside the bare network: forward, loss, backward and AdamW, written plainly in torch.

    python -m benchmarks.step --out benchmarks/results/step.jsonl

Arms, taking turns step by step on the same images, so that other work on the machine meets all of them alike:

* bare: the same network with torch's own BatchNorm, a margin loss with distance-weighted negatives in vectorised torch, torch.optim.AdamW;
* ours: a step of the training loop, with masks, losses by learner, statistics, clipping and the look at the gradient's norm;
* deepspeed: the same around DeepSpeed's engine, as several processes run it.

Times are seconds of the processor, not of the clock; on a GPU those of the clock, until it has done the step. The table shows medians.
The rows are those of one of four learners.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import record
from benchmarks.batches import PER_CLASS, random_batch
from benchmarks.engine_step import EngineStep, synchronize
from dnc_dist.base import parts
from dnc_dist.config import RunConfig, parse_tree
from dnc_dist.data.loading import Batch
from dnc_dist.processes import distributed

LEARNERS, DIM = 4, 128
LR, MARGIN, BETA, CUTOFF, FARTHEST = 1e-3, 0.2, 1.2, 0.5, 1.4
BACKBONES = {"conv4": (128, 32), "resnet18": (80, 64)}
"""Rows of a step and pixels, by name: those of the quickstart, and those of a laptop."""
Step = Callable[[int], None]


def configuration(backbone: str, rows: int, size: int, *, batch_norm: str = "auto") -> RunConfig:
    """The training that is measured: defaults but for the sizes and random weights."""
    tree = {
        "data": {"root": ".", "image_size": size, "augment": "none"},
        "model": {"backbone": backbone, "weights": "none", "embedding_dim": DIM, "dropout": 0.0, "batch_norm": batch_norm},
        "division": {"num_learners": LEARNERS},
        "schedule": {"batch_size": rows, "samples_per_class": PER_CLASS},
        "optim": {"lr": LR},
        "engine": {"precision": "fp32"},
    }
    return parse_tree(tree, "benchmark")


def margin_loss(z: Tensor, labels: Tensor) -> Tensor:
    """Margin loss of unit embeddings z (B, D), as many negatives as positives of each row, drawn by the inverse density of distances."""
    same = labels[:, None] == labels
    squared = (2 - 2 * z @ z.T).clamp(min=1e-8)
    with torch.no_grad():
        far = squared.clamp(min=CUTOFF**2)
        weight = (0.5 * (2 - z.shape[1])) * far.log() - (0.5 * (z.shape[1] - 3)) * (1 - far / 4).clamp(min=1e-6).log()
        race = weight - torch.empty_like(weight).exponential_().log()
        race = race.masked_fill(same | (squared > FARTHEST**2), -torch.inf)
        drawn = race.topk(PER_CLASS - 1)
        chosen = torch.zeros_like(same).scatter_(1, drawn.indices, drawn.values > -torch.inf)
    distance = squared.sqrt()
    others = same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    terms = torch.cat([(distance[others] - BETA + MARGIN).relu(), (BETA - distance[chosen] + MARGIN).relu()])
    return terms.sum() / (terms > 0).sum().clamp(min=1)


def bare_step(cfg: RunConfig, batch: Batch) -> Step:
    """What anybody would write."""
    torch.manual_seed(0)
    backbone = parts.build("backbone", cfg.model.backbone, pretrained=False, pooling=cfg.model.pooling).train()
    backbone, head = (part.to(batch.images.device) for part in (backbone, torch.nn.Linear(backbone.feature_dim, DIM)))
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=LR, weight_decay=cfg.optim.weight_decay)

    def step(number: int) -> None:
        pixels = ((batch.images.float() / 255 - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)
        loss = margin_loss(F.normalize(head(backbone(pixels))), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def engine_step(cfg: RunConfig, batch: Batch, *, deepspeed: bool) -> Step:
    """What the training loop does in a step but for loading and logging."""
    whole = EngineStep(cfg, int(batch.labels.max()) + 1, lr=LR, deepspeed=deepspeed)
    return lambda number: whole(batch, number)


ARMS: dict[str, Callable[[RunConfig, Batch], Step]] = {
    "bare": bare_step,
    "ours": partial(engine_step, deepspeed=False),
    "deepspeed": partial(engine_step, deepspeed=True),
}


def seconds_of(step: Step, number: int) -> float:
    """Seconds of one step: of the processor, or of a GPU."""
    if not torch.cuda.is_available():
        started = time.process_time()
        step(number)
        return time.process_time() - started
    synchronize()
    started = time.perf_counter()
    step(number)
    synchronize()
    return time.perf_counter() - started


def measure(backbone: str, rows: int, size: int, rounds: int, names: Sequence[str], warm_up: int = 2) -> dict[str, float]:
    """Median seconds of a step, by arm."""
    cfg, batch = configuration(backbone, rows, size), random_batch(rows, size).to(distributed.device())
    arms = {name: ARMS[name](cfg, batch) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(warm_up + rounds):
        for name, step in arms.items():
            seconds[name].append(seconds_of(step, number))
    return {name: statistics.median(each[warm_up:]) for name, each in seconds.items()}


def main() -> None:
    """Measure each backbone and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--rounds", type=int, default=30, help="measured steps of each arm")
    parser.add_argument("--out", type=Path, help="file of results to which a line per backbone is added")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="which of them; bare is always measured")
    args = parser.parse_args()
    names = list(dict.fromkeys(["bare", *args.arms]))
    distributed.init()
    torch.set_num_threads(1)
    clock = "gpu_seconds" if torch.cuda.is_available() else "cpu_seconds"
    print("backbone   rows pixels", *(f"{name:>9} ms" for name in names), *(f"bare/{name}" for name in names[1:]))
    for backbone in args.backbones:
        where = record.machine()
        rows, size = BACKBONES[backbone]
        found = measure(backbone, rows, size, args.rounds, names)
        shares = {name: found["bare"] / found[name] for name in names[1:]}
        shown = [f"{1000 * found[name]:>12.1f}" for name in names] + [f"{share:>{5 + len(name)}.1%}" for name, share in shares.items()]
        print(f"{backbone:<9} {rows:>5} {size:>6}", *shown)
        if args.out:
            problem = {"backbone": backbone, "rows": rows, "image_size": size, "rounds": args.rounds, "threads": 1}
            ratios = {f"bare_over_{name}": share for name, share in shares.items()}
            record.append(args.out, {"problem": problem, clock: found, **ratios, **where})
    distributed.shutdown()


if __name__ == "__main__":
    main()
