"""Division and NMI at the size of Stanford Online Products, beside faiss.Kmeans of 20 iterations in the same run, in CPU seconds.

    OMP_NUM_THREADS=1 python -m benchmarks.kmeans division nmi

`division` is a whole `divide` of 60,000 x 2048 features into 32 clusters; `nmi` is the k-means with 11,316 clusters of 60,502 x 512
embeddings. FAISS is not let choose a sample: it sees all rows, as ours does. Its iterations all cost the same, so `--peer-iterations 3`
times three and one, and reckons with 20; the line says so. `--part 4` takes a quarter of the rows and classes. Appends JSON
lines to benchmarks/results/kmeans_cpu.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from benchmarks.record import RESULTS, append, machine
from dnc_dist.base.exact import nmi
from dnc_dist.clustering import DivisionRules, Features, divide, kmeans

GROUPS, CLASS_SPREAD, ROW_SPREAD, DECAY = 64, 1.0, 0.6, 0.5
PEER_ITERATIONS = 20
SIZES = {"division": (60_000, 2048, 11_318, 32), "nmi": (60_502, 512, 11_316, 11_316)}  # rows, width, classes, clusters


def products(rows: int, width: int, classes: int) -> tuple[Tensor, np.ndarray]:
    """Unit rows of classes in groups, as products in categories, and their classes.

    Directions count less and less, as in the features of a network, so that groups overlap.
    """
    random = np.random.default_rng(7)
    weight = np.arange(1, width + 1, dtype=np.float32) ** -DECAY

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal((*shape, width), dtype=np.float32) * weight

    centres = draw(GROUPS)[random.integers(GROUPS, size=classes)] + CLASS_SPREAD * draw(classes)
    labels = np.arange(rows) % classes
    x = centres[labels]
    for block in np.array_split(x, 64):
        block += ROW_SPREAD * draw(len(block))
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return torch.from_numpy(x), labels


def timed(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it found, with the CPU seconds of all threads and the wall's."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    return {"cpu_seconds": round(time.process_time() - cpu, 2), "wall_seconds": round(time.perf_counter() - wall, 1), **found}


def ours(task: str, x: Tensor, labels: np.ndarray, clusters: int) -> dict[str, Any]:
    if task == "division":
        division = divide(Features.alone(x), labels, DivisionRules(clusters, mode="flat"), epoch=0)
        return {"objective": division.objective, "trials": division.trials}
    found = kmeans(Features.alone(x), clusters, seed=0)
    return {"objective": found.objective, "iterations": found.iterations, "nmi": round(nmi(found.assignment.numpy(), labels), 4)}


def peer(x: Tensor, clusters: int, iterations: int) -> dict[str, Any]:
    means = faiss.Kmeans(x.shape[1], clusters, niter=iterations, seed=1, max_points_per_centroid=10**9, min_points_per_centroid=1)
    means.train(x.numpy())
    return {"objective": float(np.asarray(means.obj)[-1]), "iterations": iterations}


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="+", choices=SIZES)
    parser.add_argument("--peer-iterations", type=int, default=PEER_ITERATIONS, help="FAISS iterations that are really run")
    parser.add_argument("--part", type=int, default=1, help="one in so many rows, classes and, of nmi, clusters")
    args = parser.parse_args()
    for task in args.tasks:
        rows, width, classes, clusters = SIZES[task]
        rows, classes = rows // args.part, classes // args.part
        clusters = classes if task == "nmi" else clusters
        x, labels = products(rows, width, classes)
        size = {"task": task, "rows": rows, "width": width, "clusters": clusters, "threads": torch.get_num_threads()}
        found = timed(lambda: ours(task, x, labels, clusters))  # noqa: B023  (called before the next task)
        other = timed(lambda: peer(x, clusters, args.peer_iterations))  # noqa: B023
        reckoned = other["cpu_seconds"]
        if left := PEER_ITERATIONS - args.peer_iterations:
            first = timed(lambda: peer(x, clusters, 1))["cpu_seconds"]  # noqa: B023
            reckoned += left * (reckoned - first) / (args.peer_iterations - 1)
        lines = (
            {"implementation": "ours", **found, "times_faiss": round(found["cpu_seconds"] / reckoned, 2)},
            {"implementation": "faiss.Kmeans", **other, "cpu_seconds_of_20": round(reckoned, 2)},
        )
        for line in lines:
            append(RESULTS / "kmeans_cpu.jsonl", {**size, **line, **machine()})
            print("  ".join(f"{name}={value}" for name, value in (size | line).items()), flush=True)


if __name__ == "__main__":
    main()
