"""k-means: one Lloyd iteration (assignment, sums, counts, new centroids), ours and others', in time, bandwidth and objective.

    PYTHONPATH=kernels python -m bench.kmeans --out benchmarks/results/kernels_kmeans_cpu.jsonl

All start from the same centroids. The time of an iteration is (time of 6 - time of 1) / 5, so preparation does not count.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench import baselines, measure, roofline
from bench.measure import NotRun, triton_module
from bench.sweep import walk
from dnc_kernels import reference

SIZES, CPU_SIZES = (1_000_000, 10_000_000, 100_000), (100_000,)
CENTROIDS, CPU_CENTROIDS = (32, 4, 1000), (4, 32)
MATRICES, CPU_MATRICES = ((512, "bfloat16"), (512, "float32"), (2048, "bfloat16"), (2048, "float32")), ((512, "float32"),)
ITERATIONS = 5
CHECKED_ROWS = 1_000_000  # of x at most, for objective and errors
REFERENCE_UP_TO = 1_000_000
FAISS_UP_TO = 100_000
TRUE_CLUSTERS, SEED = 256, 7

Fit = Callable[[int], Tensor]  # centroids (K, D) after that many iterations


@dataclass(frozen=True)
class Case:
    """One size."""

    rows: int
    dim: int
    centroids: int
    dtype: str


QUICK = (Case(300, 32, 4, "float32"),)
SWEPT = (
    Case(1_000_000, 512, 32, "bfloat16"),
    Case(1_000_000, 512, 4, "bfloat16"),
    Case(1_000_000, 512, 32, "float32"),
    Case(1_000_000, 2048, 32, "bfloat16"),
    Case(1_000_000, 512, 1000, "bfloat16"),
)
CHOOSERS = (("kmeans_resident", "shape"), ("kmeans_streamed", "nearest_shape"), ("kmeans_streamed", "one_hot_shape"))


def mixture(rows: int, dim: int, dtype: str, device: torch.device) -> Tensor:
    """(rows, dim) around TRUE_CLUSTERS centres, made in chunks, so that only the result is large."""
    random = torch.Generator(device).manual_seed(SEED)
    centres = torch.randn(TRUE_CLUSTERS, dim, generator=random, device=device)
    x = torch.empty(rows, dim, dtype=getattr(torch, dtype), device=device)
    for chunk in x.split(max(1, (1 << 28) // dim)):
        centre = torch.randint(TRUE_CLUSTERS, (chunk.shape[0],), generator=random, device=device)
        chunk.copy_(centres[centre].add_(torch.randn(chunk.shape, generator=random, device=device)))
    return x


def moved(sums: Tensor, counts: Tensor, centroids: Tensor) -> Tensor:
    """The next centroids, float32; an empty one stays."""
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids).float()


def iterated(step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, start: Tensor) -> Fit:
    """Iterations of a step that gives sums and counts."""

    def fit(iterations: int) -> Tensor:
        centroids = start
        for _ in range(iterations):
            centroids = moved(*step(x, centroids), centroids)
        return centroids

    return fit


def triton(x: Tensor, start: Tensor) -> Fit:
    module = triton_module("kmeans", x.device)
    return iterated(lambda rows, centroids: module.lloyd_step(rows, centroids)[2:], x, start)


def eager_tf32(x: Tensor, start: Tensor) -> Fit:
    """Products of float32 rows as tf32: faster, and centroids and assignments are only as exact as that."""
    fit = iterated(baselines.lloyd, x, start)

    def with_tf32(iterations: int) -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return fit(iterations)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return with_tf32


def compiled(x: Tensor, start: Tensor) -> Fit:
    torch.compiler.reset()
    return iterated(torch.compile(baselines.lloyd, dynamic=False), x, start)


def flash_kmeans(x: Tensor, start: Tensor) -> Fit:
    """Version 0.3.1, whose update spills registers from D = 512 on."""
    if x.device.type != "cuda":
        raise NotRun("flash-kmeans needs a GPU")
    try:
        from flash_kmeans import batch_kmeans_Euclid
    except ImportError:
        raise NotRun("flash-kmeans is not installed") from None
    if not batch_kmeans_Euclid.__module__.endswith("_triton_impl"):
        raise NotRun("flash-kmeans fell back to its torch implementation")
    # A copy: where it moves centroids in place, every fit must still start from the same ones.
    return lambda iterations: batch_kmeans_Euclid(
        x[None], n_clusters=start.shape[0], max_iters=iterations, tol=-1, init_centroids=start.to(x.dtype)[None].clone()
    )[1][0].float()


def faiss(x: Tensor, start: Tensor) -> Fit:
    """On the CPU with all its threads, also where the others run on a GPU."""
    try:
        import faiss as library
    except ImportError:
        raise NotRun("FAISS is not installed") from None
    rows, centroids = x.float().cpu().numpy(), start.cpu().numpy()

    def fit(iterations: int) -> Tensor:
        means = library.Kmeans(
            x.shape[1], start.shape[0], niter=iterations, seed=SEED, max_points_per_centroid=10**9, min_points_per_centroid=1
        )
        means.train(rows, init_centroids=centroids)
        return torch.from_numpy(means.centroids).to(x.device)

    return fit


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor], Fit]] = {
    "triton": triton,
    "eager": lambda x, start: iterated(baselines.lloyd, x, start),
    "eager-tf32": eager_tf32,
    "flash-kmeans": flash_kmeans,
    "compile": compiled,
    "reference": lambda x, start: iterated(lambda rows, centroids: reference.lloyd_step(rows, centroids)[2:], x, start),
    "faiss (CPU)": faiss,
}


def applies(name: str, case: Case, device: torch.device) -> bool:
    """Is the implementation measured at this size? Compiling takes longer than the budget allows for all of them."""
    if name == "compile":
        return device.type == "cuda" and case.dtype == "bfloat16" and case.dim == 512 and case.centroids <= 32
    if name == "eager-tf32":
        return device.type == "cuda" and case.dtype == "float32"
    if name == "flash-kmeans":
        return case.dtype == "bfloat16" and (case.dim == 512 or (case.rows, case.centroids) == (1_000_000, 32))
    if name == "faiss (CPU)":
        return case.rows <= FAISS_UP_TO and case.dtype == "float32" and case.dim <= 512
    return name != "reference" or (case.rows <= REFERENCE_UP_TO and case.centroids <= 32)


def objective(x: Tensor, centroids: Tensor) -> float:
    """Mean squared distance of the first rows of x to their nearest centroid."""
    total = 0.0
    for rows in x[:CHECKED_ROWS].split(max(1, baselines.CHUNK_ELEMENTS // max(x.shape[1], centroids.shape[0]))):
        rows = rows.float()
        nearest = torch.addmm(0.5 * centroids.square().sum(1), rows, centroids.T, alpha=-1.0).argmin(1)
        total += float((rows - centroids[nearest]).square().sum(dtype=torch.float64))
    return total / min(CHECKED_ROWS, x.shape[0])


def errors(x: Tensor, start: Tensor) -> dict[str, Any]:
    """Of the Triton step against the float64 reference on the first rows: rows assigned elsewhere, and their sums on its own assignment."""
    x = x[:CHECKED_ROWS]
    step = triton_module("kmeans", x.device).lloyd_step
    assignment, _, sums, counts = step(x, start)
    expected = torch.cat([reference.lloyd_step(rows.double(), start.double())[0] for rows in x.split(1 << 16)])
    right = torch.zeros(start.shape, dtype=torch.float64, device=x.device)
    for rows, names in zip(x.split(1 << 16), assignment.split(1 << 16), strict=True):
        right += torch.nn.functional.one_hot(names, start.shape[0]).double().T @ rows.double()
    return {
        "rows_assigned_elsewhere": float(f"{float((assignment != expected).double().mean()):.3g}"),
        "error_sums": float(f"{float((sums - right).norm() / right.norm()):.2g}"),
        "counts_exact": bool(torch.equal(counts, torch.bincount(assignment, minlength=start.shape[0]))),
        "repeatable": all(torch.equal(value, again) for value, again in zip((assignment, sums), step(x, start)[0:3:2], strict=True)),
    }


def measured(name: str, case: Case, x: Tensor, run: measure.Run) -> dict[str, Any]:
    """Everything about one implementation at one size."""
    start = x[: case.centroids].float()
    before = measure.allocated(run.device)
    fit = IMPLEMENTATIONS[name](x, start)
    row: dict[str, Any] = {"objective": float(f"{objective(x, fit(ITERATIONS)):.8g}")}
    if name == "triton":
        row |= errors(x, start)
    one = measure.time_phases({"fit": lambda: fit(1)}, run.device, run.seconds / 4)
    many = measure.time_phases({"fit": lambda: fit(1 + ITERATIONS)}, run.device, run.seconds)
    row["iteration_ms"] = [float(f"{(value - one['full_ms'][0]) / ITERATIONS:.5g}") for value in many["full_ms"]]
    row |= {"calls": many["calls"], "spread": many.get("spread"), "peak_mb": measure.once(lambda: fit(1), run.device, before)[1]}
    if run.device.type == "cuda" and name != "faiss (CPU)":
        row["floor"] = floor = roofline.lloyd_step(case.rows, case.dim, case.centroids, case.dtype, run.ceilings)
        row["roofline"] = round(floor["total_ms"] / row["iteration_ms"][0], 3)
        row["copy_bandwidth"] = round(x.nbytes / (1e-3 * row["iteration_ms"][0]) / run.ceilings["copy"], 3)
    return row


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """The sizes, those that matter most first."""
    if quick:
        yield from QUICK
        return
    cuda = device.type == "cuda"
    axes = (MATRICES, SIZES, CENTROIDS) if cuda else (CPU_MATRICES, CPU_SIZES, CPU_CENTROIDS)
    for (dim, dtype), rows, centroids in itertools.product(*axes):
        yield Case(rows, dim, centroids, dtype)


def sweep(run: measure.Run, quick: bool) -> None:
    """Tiles of every route."""
    for case in QUICK if quick else SWEPT:
        x = mixture(case.rows, case.dim, case.dtype, run.device)
        start = x[: case.centroids].float()
        for name, chooser in CHOOSERS:
            module = importlib.import_module(f"dnc_kernels.{name}")
            walk(module, chooser, functools.partial(triton_module("kmeans", run.device).lloyd_step, x, start), run, asdict(case))


def main() -> None:
    """Run the matrix."""
    args = measure.matrix_arguments("kmeans", budget=135.0).parse_args()
    wanted = measure.wanted(args.only, IMPLEMENTATIONS)
    run = measure.Run("kmeans", args)
    if args.sweep:
        sweep(run, args.quick)
        return
    x, kept = torch.empty(0), None
    for case in cases(run.device, args.quick):
        if kept != (matrix := (case.rows, case.dim, case.dtype)):
            x, kept = torch.empty(0), matrix
            measure.allocated(run.device)
        for name in wanted:
            if not applies(name, case, run.device):
                continue

            def row(name: str = name, case: Case = case) -> dict[str, Any]:
                nonlocal x
                if not x.numel():
                    x = mixture(case.rows, case.dim, case.dtype, run.device)
                return measured(name, case, x, run)

            run.row({"implementation": name, **asdict(case)}, row)


if __name__ == "__main__":
    main()
