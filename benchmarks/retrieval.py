"""Exact retrieval with the gallery spread over processes: time, memory of each, and proof against brute force.

    python -m benchmarks.retrieval --rows 1000000 --dim 128 --queries 10000 --nproc 2 --out benchmarks/results/retrieval.jsonl

Runs the real `evaluate` (protocol query-gallery) on clustered unit vectors, of which each process makes its own rows only. Then checks:
a sample of queries against brute force (float64 direct differences to every gallery row, ties by row), and one process against several
at a smaller size, digit by digit. Two peers that hold all rows in one process are timed beside it: FAISS's flat index and a product
with torch.topk. Ends with exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import resource
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import torch.multiprocessing as mp

from benchmarks import record
from dnc_dist.processes import distributed
from dnc_dist.retrieval import RetrievalResult, evaluate
from dnc_dist.retrieval.protocols.base import SAMPLE_NEIGHBOURS
from dnc_dist.retrieval.protocols.exact import sample_of

MB = 1e6
BLOCK = 8192  # rows that are made from one seed
CHUNK = 16 * BLOCK  # rows that a process without all of them makes at a time
STAGES = {  # what a profile of `evaluate` is summed up to: functions (file, name), with all that they call
    "products": ("compared.py", "_compare"),  # and what is made of them
    "exact_distances": ("compared.py", "_distances"),
    "collectives": ("distributed.py", "gather_rows"),  # waiting for slower ranks is part of it
}


@dataclass(frozen=True)
class Problem:
    """Clustered unit vectors, `rows` to search and `queries` that ask, mixed; nothing depends on the number of processes."""

    rows: int
    dim: int
    queries: int
    per_class: int
    noise: float
    seed: int

    @property
    def total(self) -> int:
        return self.rows + self.queries

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64."""
        return np.random.default_rng((self.seed, 1)).permutation(self.total) % self.num_classes

    @property
    def num_classes(self) -> int:
        return max(2, self.rows // self.per_class)

    @property
    def asks(self) -> np.ndarray:
        """(N,) bool: the queries; all other rows are the gallery."""
        asks = np.zeros(self.total, bool)
        asks[np.arange(self.queries) * self.total // self.queries] = True
        return asks

    def vectors(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, D) float32 rows of unit length."""
        centres = np.random.default_rng(self.seed).standard_normal((self.num_classes, self.dim), np.float32)
        labels, made = self.labels, np.empty((stop - start, self.dim), np.float32)
        for at in range(start // BLOCK * BLOCK, stop, BLOCK):
            block = np.random.default_rng((self.seed, 2, at)).standard_normal((BLOCK, self.dim), np.float32)
            first, last = max(at, start), min(at + BLOCK, stop)
            block = self.noise * block[first - at : last - at] + centres[labels[first:last]]
            made[first - start : last - start] = block / np.linalg.norm(block, axis=1, keepdims=True)
        return made


def resident_mb() -> float:
    """Memory of this process that is in RAM now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MB


def peak_mb() -> float:
    """The most that this process ever had in RAM. Not ru_maxrss, which begins with what the starting process had."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / MB


def sharded(problem: Problem, sample: int) -> dict[str, Any]:
    """Collective. What `evaluate` finds, also for the sampled queries alone, and what it took on this rank."""
    started = resident_mb()
    at = time.perf_counter()
    start, stop = distributed.local_range(problem.total)
    vectors = torch.from_numpy(problem.vectors(start, stop))
    rows, labels, asks = torch.arange(start, stop), problem.labels, problem.asks
    distributed.barrier()
    seconds = {"make_vectors": time.perf_counter() - at}
    before, at, cpu = resident_mb(), time.perf_counter(), time.process_time()
    profile = cProfile.Profile()
    profile.enable()
    result = evaluate(vectors, rows, labels, asks, ~asks, protocol="query-gallery", sample=sample)
    profile.disable()
    seconds |= {"evaluate": time.perf_counter() - at, "evaluate_cpu": time.process_time() - cpu}
    for (file, _, function), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        for stage, (where, name) in STAGES.items():
            if function == name and file.endswith(where):
                seconds[stage] = cumulative
    memory = {"start": started, "with_vectors": before, "vectors": vectors.nbytes / MB, "peak": peak_mb()}
    chosen = np.zeros(problem.total, bool)
    chosen[sample_of(np.flatnonzero(asks), sample)] = True
    of_sample = evaluate(vectors, rows, labels, chosen, ~asks, protocol="query-gallery", sample=sample)
    return {"result": result, "of_sample": of_sample, "seconds": seconds, "memory_mb": memory}


def _chunk(problem: Problem, start: int) -> np.ndarray:
    return problem.vectors(start, min(start + CHUNK, problem.total))


def faiss_flat(problem: Problem, k: int) -> dict[str, Any]:
    """Peer: `faiss.IndexFlatL2` over all rows in one process, float32, ties as they come."""
    gallery, queries = _all_rows(problem)
    index = faiss.IndexFlatL2(problem.dim)
    index.add(gallery)
    del gallery
    return _timed(problem, queries, lambda block: index.search(block.numpy(), k)[1])


def torch_topk(problem: Problem, k: int) -> dict[str, Any]:
    """Peer: the product of queries and all rows in one process, 64 queries at a time, and `torch.topk`."""
    gallery, queries = _all_rows(problem)
    rows = torch.from_numpy(gallery)
    return _timed(problem, queries, lambda block: torch.cat([(part @ rows.T).topk(k, 1).indices for part in block.split(64)]).numpy())


def _all_rows(problem: Problem) -> tuple[np.ndarray, torch.Tensor]:
    """The gallery, made in place, and the queries."""
    gallery, queries, asks = np.empty((problem.rows, problem.dim), np.float32), [], problem.asks
    at = 0
    for start in range(0, problem.total, CHUNK):
        rows, asking = _chunk(problem, start), asks[start : start + CHUNK]
        queries.append(rows[asking])
        offered = rows[~asking]
        gallery[at : at + len(offered)] = offered
        at += len(offered)
    return gallery, torch.from_numpy(np.concatenate(queries))


def _timed(problem: Problem, queries: torch.Tensor, search: Callable[[torch.Tensor], np.ndarray]) -> dict[str, Any]:
    labels, asks = problem.labels, problem.asks
    at, cpu = time.perf_counter(), time.process_time()
    found = search(queries)
    seconds, cpu = time.perf_counter() - at, time.process_time() - cpu
    recall = float((labels[~asks][found[:, 0]] == labels[asks]).mean())
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_mb": round(peak_mb(), 1), "recall@1": recall}


def _worker(rank: int, part: Callable[..., Any], nproc: int, port: int, folder: str, threads: int, arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(nproc), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    distributed.init()
    torch.save(part(*arguments), f"{folder}/{rank}")
    distributed.shutdown()


def run(part: Callable[..., dict[str, Any]], nproc: int, *arguments: Any) -> list[dict[str, Any]]:
    """What a function returns on each of `nproc` fresh processes, which share the cores evenly."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (part, nproc, port, folder, threads, arguments), nproc)
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(nproc)]


def brute_force(problem: Problem, query_rows: np.ndarray) -> dict[str, Any]:
    """recall@1 and map@r of these queries, their nearest rows and distances: float64 differences to every row of the gallery."""
    labels, asks = problem.labels, problem.asks
    starts = range(0, problem.total, CHUNK)
    queries = torch.empty(len(query_rows), problem.dim, dtype=torch.float64)
    for start in starts:
        here = (query_rows >= start) & (query_rows < start + CHUNK)
        queries[torch.from_numpy(here)] = torch.from_numpy(_chunk(problem, start)[query_rows[here] - start]).double()
    distance = torch.empty(len(query_rows), problem.total)
    for start in starts:
        rows = torch.from_numpy(_chunk(problem, start))
        for at in range(0, len(rows), 512):  # so few that the differences stay in the cache
            block = rows[at : at + 512].double()
            for number, query in enumerate(queries):
                distance[number, start + at : start + at + len(block)] = (block - query).square_().sum(1)
    distance[:, torch.from_numpy(asks)] = torch.inf
    # Stable: among equal distances the smaller row comes first.
    order = distance.argsort(dim=1, stable=True)
    nearest = order[:, :SAMPLE_NEIGHBOURS]
    per_class = np.bincount(labels[~asks], minlength=problem.num_classes)
    precision = []
    for label, line in zip(labels[query_rows], order.numpy(), strict=True):
        relevant = per_class[label]
        hits = labels[line[:relevant]] == label
        precision.append((np.cumsum(hits) / np.arange(1, relevant + 1))[hits].sum() / relevant)
    return {
        "recall@1": float((labels[nearest[:, 0].numpy()] == labels[query_rows]).mean()),
        "map@r": float(np.mean(precision)),
        "neighbours": nearest.numpy(),
        "distances": distance.gather(1, nearest).numpy(),
    }


def same(first: RetrievalResult, second: RetrievalResult) -> bool:
    """Whether two results are equal in every digit."""
    return all(np.array_equal(value, getattr(second, name)) for name, value in vars(first).items())


def check(problem: Problem, found: list[dict[str, Any]], sample: int) -> dict[str, bool]:
    """What was proved about the sharded search, name by name."""
    result, of_sample = found[0]["result"], found[0]["of_sample"]
    expected = brute_force(problem, result.sample_queries)
    return {
        "recall@1 of the sample equals brute force": of_sample.metrics["recall@1"] == expected["recall@1"],
        "map@r of the sample equals brute force": abs(of_sample.metrics["map@r"] - expected["map@r"]) < 1e-12,
        "neighbours of the sample equal brute force": np.array_equal(result.sample_neighbours, expected["neighbours"]),
        "distances of the sample equal brute force": np.array_equal(result.sample_distances, expected["distances"]),
        "all ranks have the same result": all(same(result, other["result"]) for other in found),
    }


def main() -> None:
    """Measure, check, print, and write one line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=50_000, help="rows of the gallery")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--nproc", type=int, default=2, help="processes that share gallery and queries")
    parser.add_argument("--per-class", type=int, default=20, help="gallery rows of a class")
    parser.add_argument("--noise", type=float, default=1.5, help="of a vector around the centre of its class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=100, help="queries that are checked against brute force")
    parser.add_argument("--small", type=int, default=20_000, help="gallery rows at which one process is compared with several")
    parser.add_argument("--no-peers", action="store_true", help="leave the peers out")
    parser.add_argument("--out", type=Path, help="file to which the JSON line is appended")
    args = parser.parse_args()
    problem = Problem(args.rows, args.dim, args.queries, args.per_class, args.noise, args.seed)
    line: dict[str, Any] = {"benchmark": "retrieval", **vars(problem), "nproc": args.nproc, **record.machine()}
    print(
        f"{args.rows:,} x {args.dim} gallery, {args.queries:,} queries on {args.nproc} processes, {line['device']}, {line['cores']} cores"
    )

    found = run(sharded, args.nproc, problem, args.sample)
    result = found[0]["result"]
    line |= {"metrics": result.metrics, "gallery_mb": round(4 * args.rows * args.dim / MB, 1)}
    line["ranks"] = [{key: {name: round(v, 2) for name, v in rank[key].items()} for key in ("seconds", "memory_mb")} for rank in found]
    line["queries_per_second"] = round(args.queries / max(rank["seconds"]["evaluate"] for rank in found), 1)
    for number, rank in enumerate(line["ranks"]):
        print(f"rank {number}: seconds " + ", ".join(f"{name} {value}" for name, value in rank["seconds"].items()))
        memory = rank["memory_mb"]
        print(
            f"rank {number}: peak {memory['peak']:.0f} MB = {memory['start']:.0f} libraries + {memory['vectors']:.0f} its own vectors + "
            f"{memory['peak'] - memory['start'] - memory['vectors']:.0f} for the search"
        )
    print(f"{line['queries_per_second']} queries/s; " + ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()))

    line["checks"] = check(problem, found, args.sample)
    small = Problem(args.small, args.dim, max(1, args.small // 40), args.per_class, args.noise, args.seed)
    results = {nproc: run(sharded, nproc, small, args.sample)[0]["result"] for nproc in (1, args.nproc)}
    line["checks"][f"1 and {args.nproc} processes give the same digits at {args.small:,} rows"] = same(results[1], results[args.nproc])
    for name, holds in line["checks"].items():
        print(f"{'yes' if holds else 'NO '}  {name}")

    k = max(SAMPLE_NEIGHBOURS, *np.bincount(problem.labels[~problem.asks]))
    for peer in () if args.no_peers else (faiss_flat, torch_topk):
        line[peer.__name__] = got = run(peer, 1, problem, int(k))[0]
        print(
            f"peer {peer.__name__} (one process, all rows; its search alone): {got['seconds']} s, {got['cpu_seconds']} CPU s, "
            f"peak {got['peak_mb']:.0f} MB, recall@1 {got['recall@1']:.4f}"
        )
    if args.out is not None:
        record.append(args.out, line)
    raise SystemExit(0 if all(line["checks"].values()) else 1)


if __name__ == "__main__":
    main()
