"""All metrics at the size of Stanford Online Products' test set, every image against all others: ours, and two peers in the same run.

    python -m benchmarks.retrieval_sop --out benchmarks/results/retrieval.jsonl

60,502 clustered unit vectors x 512 of 11,316 classes, 2 to 12 rows each. Measures `evaluate` (leave-one-out) with recall@1..8 and with
recall@1000, on 1 and 2 processes; pytorch-metric-learning's AccuracyCalculator; and the flat search of FAISS alone. Each runs in
fresh processes, one part after the other. Prints seconds, CPU seconds and the memory that each needs beside the vectors, and checks that
1 and 2 processes give the same digits, and some queries against brute force. Ends with exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from benchmarks import record
from benchmarks.retrieval import BLOCK, peak_mb, resident_mb, run, same
from dnc_dist.base.exact import squared_distance
from dnc_dist.processes import distributed
from dnc_dist.retrieval import RetrievalResult, evaluate

ROWS, CLASSES, FEWEST, MOST = 60_502, 11_316, 2, 12
RANK = 16  # dimensions in which the centres of classes lie
RECALL_AT = {"recall@8": (1, 2, 4, 8), "recall@1000": (1, 10, 100, 1000)}


@dataclass(frozen=True)
class Products:
    """Clustered unit vectors; nothing depends on the number of processes."""

    rows: int
    dim: int
    noise: float
    seed: int

    @property
    def num_classes(self) -> int:
        return self.rows * CLASSES // ROWS

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64."""
        random = np.random.default_rng((self.seed, 1))
        free = np.repeat(np.arange(self.num_classes), MOST - FEWEST)
        more = random.permutation(free)[: self.rows - FEWEST * self.num_classes]
        return random.permutation(np.concatenate([np.repeat(np.arange(self.num_classes), FEWEST), more]))

    def vectors(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, D) float32 rows of unit length."""
        random = np.random.default_rng(self.seed)
        space = random.standard_normal((RANK, self.dim), np.float32) / np.float32(RANK**0.5)
        centres = random.standard_normal((self.num_classes, RANK), np.float32)
        made = np.empty((stop - start, self.dim), np.float32)
        for at in range(start // BLOCK * BLOCK, stop, BLOCK):
            block = np.random.default_rng((self.seed, 2, at)).standard_normal((BLOCK, self.dim), np.float32)
            first, last = max(at, start), min(at + BLOCK, stop)
            block = self.noise * block[first - at : last - at] + centres[self.labels[first:last]] @ space
            made[first - start : last - start] = block / np.linalg.norm(block, axis=1, keepdims=True)
        return made


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What it returns; its seconds, CPU seconds, and the most memory that it needed at a time beside what was there before."""
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before could be used without being seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, at, cpu = resident_mb(), time.perf_counter(), time.process_time()
    result = work()
    seconds, cpu = time.perf_counter() - at, time.process_time() - cpu
    return result, {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "extra_mb": round(peak_mb() - before, 1)}


def ours(problem: Products, recall_at: tuple[int, ...]) -> dict[str, Any]:
    """Collective. What `evaluate` finds, and what it took on this rank."""
    start, stop = distributed.local_range(problem.rows)
    vectors, rows, labels = torch.from_numpy(problem.vectors(start, stop)), torch.arange(start, stop), problem.labels
    every = np.ones(problem.rows, bool)
    few = min(len(rows), 256)
    evaluate(vectors[:few], rows[:few], labels, every, every, protocol="leave-one-out")  # libraries load what they need
    distributed.barrier()
    result, took = measured(lambda: evaluate(vectors, rows, labels, every, every, protocol="leave-one-out", recall_at=recall_at, sample=24))
    return {"result": result, **took}


def pytorch_metric_learning(problem: Products) -> dict[str, Any]:
    """Peer: its three metrics in float32, ties as they come."""
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    names = ("precision_at_1", "mean_average_precision_at_r", "r_precision")
    calculator = AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu"))
    vectors, labels = torch.from_numpy(problem.vectors(0, problem.rows)), torch.from_numpy(problem.labels)
    calculator.get_accuracy(vectors[:256], labels[:256])
    metrics, took = measured(lambda: calculator.get_accuracy(vectors, labels))
    return {**took, "metrics": dict(zip(("recall@1", "map@r", "r_precision"), (float(metrics[name]) for name in names), strict=True))}


def faiss_flat(problem: Products) -> dict[str, Any]:
    """Peer: `faiss.IndexFlatL2` asked for as many neighbours as the metrics need; its search alone."""
    vectors = problem.vectors(0, problem.rows)

    def search() -> np.ndarray:
        index = faiss.IndexFlatL2(problem.dim)
        index.add(vectors)
        return index.search(vectors, MOST)[1]

    return measured(search)[1]


def equal_brute_force(problem: Products, result: RetrievalResult, sample: int) -> bool:
    """Whether some queries found what float64 differences to all rows say, ties by row."""
    assert result.queries is not None
    vectors, labels, found = problem.vectors(0, problem.rows), problem.labels, result.queries
    for place in np.random.default_rng(problem.seed).permutation(len(found.rows))[:sample]:
        query = found.rows[place]
        blocks = [squared_distance(vectors[query], vectors[at : at + 1024]) for at in range(0, problem.rows, 1024)]
        distance = np.concatenate(blocks).astype(np.float32)
        distance[query] = np.inf
        order = np.argsort(distance, kind="stable")
        places = 1 + np.flatnonzero(labels[order[:-1]] == labels[query])
        precision = np.where(places <= len(places), np.arange(1, len(places) + 1) / places, 0).mean()
        expected = (places[0], order[0], distance[order[0]])
        if expected != (found.first_hit[place], found.nearest[place], found.distance[place]):
            return False
        if abs(precision - found.average_precision[place]) > 1e-12:
            return False
    return True


def main() -> None:
    """Measure, check, print, and write one line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=ROWS, help="fewer for a shorter run; the number of classes follows")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--noise", type=float, default=1.5, help="of a vector around the centre of its class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=50, help="queries that are checked against brute force")
    parser.add_argument("--no-peers", action="store_true", help="leave the peers out")
    parser.add_argument("--out", type=Path, help="file to which the JSON line is appended")
    args = parser.parse_args()
    problem = Products(args.rows, args.dim, args.noise, args.seed)
    line: dict[str, Any] = {"benchmark": "retrieval_sop", "num_classes": problem.num_classes, **vars(problem), **record.machine()}
    line["vectors_mb"] = round(4 * args.rows * args.dim / 1e6, 1)
    print(f"{args.rows:,} x {args.dim}, {problem.num_classes:,} classes, {line['device']}, {line['cores']} cores")
    results: dict[str, list[dict[str, Any]]] = {}
    for name, recall_at in RECALL_AT.items():
        for nproc in (1, 2):
            results[f"{name}, {nproc} processes"] = run(ours, nproc, problem, recall_at)
            line[f"{name}, {nproc} processes"] = _shown(f"{name}, {nproc} processes", results[f"{name}, {nproc} processes"])
    first = results["recall@8, 1 processes"][0]["result"]
    line["metrics"] = first.metrics | results["recall@1000, 1 processes"][0]["result"].metrics
    print(", ".join(f"{name} {value:.4f}" for name, value in line["metrics"].items()))
    line["checks"] = {
        f"{name}: 1 and 2 processes give the same digits": all(
            same(results[f"{name}, 1 processes"][0]["result"], rank["result"]) for rank in results[f"{name}, 2 processes"]
        )
        for name in RECALL_AT
    }
    line["checks"][f"{args.sample} queries equal brute force"] = equal_brute_force(problem, first, args.sample)
    for name, holds in line["checks"].items():
        print(f"{'yes' if holds else 'NO '}  {name}")
    for peer in () if args.no_peers else (pytorch_metric_learning, faiss_flat):
        found = run(peer, 1, problem)
        line[peer.__name__] = found[0]
        _shown(peer.__name__, found)
    if not args.no_peers:
        _compare(line)
    if args.out is not None:
        record.append(args.out, line)
    raise SystemExit(0 if all(line["checks"].values()) else 1)


def _shown(name: str, ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Print and return: seconds of the slowest rank, CPU seconds of all together, memory of the largest."""
    took = {key: combine(rank[key] for rank in ranks) for key, combine in (("seconds", max), ("cpu_seconds", sum), ("extra_mb", max))}
    print(f"{name}: {took['seconds']:.1f} s, {took['cpu_seconds']:.1f} CPU s, {took['extra_mb']:.0f} MB beside the vectors", flush=True)
    return took


def _compare(line: dict[str, Any]) -> None:
    mine, peer = line["recall@8, 1 processes"], line["pytorch_metric_learning"]
    line["ratios"] = {
        "CPU seconds of pytorch-metric-learning / ours": round(peer["cpu_seconds"] / mine["cpu_seconds"], 2),
        "CPU seconds of a flat search / ours": round(line["faiss_flat"]["cpu_seconds"] / mine["cpu_seconds"], 2),
        "memory of pytorch-metric-learning / ours": round(peer["extra_mb"] / mine["extra_mb"], 2),
        "CPU seconds for recall@1000 / for recall@8": round(line["recall@1000, 1 processes"]["cpu_seconds"] / mine["cpu_seconds"], 2),
    }
    for name, value in line["ratios"].items():
        print(f"{value:6.2f}  {name}")
    for name, value in peer["metrics"].items():
        print(f"{name}: ours {line['metrics'][name]:.6f}, pytorch-metric-learning {value:.6f}")


if __name__ == "__main__":
    main()
