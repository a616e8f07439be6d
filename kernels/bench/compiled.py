"""Compile what the Triton functions launch by default, for GPUs that are not there, and report what ptxas made of it as JSON.

    PYTHONPATH=kernels python -m bench.compiled [--workers 2] > report.json

The public functions run on CPU tensors in front of a driver that names a GPU, compiles every launch exactly as that GPU
would, and launches nothing. So this file knows no tile shape and no signature: what a user's call compiles is what is
measured. Every case then runs again with other sizes, numbers and row orders, which must compile nothing new.
It needs a process of its own, because Triton's interpreter and its compiler cannot live in one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from bench.machine_code import resources
from dnc_kernels import kmeans, probe, race
from dnc_kernels import margin as kernels
from dnc_kernels.contract import MARGIN, Pairs, Rows, Sampling

ARCHITECTURES = (80, 90)
PROCESSORS = {80: 108, 90: 132}  # of an A100, of an H100 or H200
INSTRUCTIONS = {  # of the PTX, which ptxas turns into one machine instruction each
    "wgmma": r"\bwgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "loads_16_bytes": r"\bld\.global\.v4\.b32|\bcp\.async\.cg\.shared\.global [^;]*\], 0x10",
    "loads": r"\bld\.global|\bcp\.async\.c[ag]",
}


class AbsentGpu:
    """Stands in for Triton's driver: device number 90 is an sm_90."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


class Launches:
    """While open, a launch compiles its kernel and stops there; fresh tensors are zeros, as nothing fills them."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.compiled: dict[str, tuple[CompiledKernel, str]] = {}
        self.case = ""

    def __enter__(self) -> Launches:
        triton.runtime.driver.set_active(AbsentGpu(self.architecture))
        compile_only, launches = JITFunction.run, self

        def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> CompiledKernel:
            kernel = compile_only(self, *args, grid=grid, warmup=True, **options)
            launches.compiled.setdefault(kernel.hash, (kernel, launches.case))
            return kernel

        default_tile = race.default_tile
        replaced: list[tuple[Any, str, Any]] = [
            (JITFunction, "run", run),
            (torch, "empty", torch.zeros),
            (torch, "empty_like", torch.zeros_like),
            (torch.Tensor, "new_empty", torch.Tensor.new_zeros),
            # The choices that depend on the device are told of the absent one.
            (torch.cuda, "get_device_capability", lambda device=None: divmod(self.architecture, 10)),
            (race, "default_tile", lambda num_anchors, device: default_tile(num_anchors, torch.device("cuda"))),
            (race, "num_processors", lambda device: PROCESSORS[self.architecture]),
        ]
        for owner, name, value in replaced:
            setattr(owner, name, value)
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing to restore: the process ends with its task."""


def describe(kernel: CompiledKernel, case: str, architecture: int) -> dict[str, Any]:
    """One line of the report."""
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items() if isinstance(value, (int, float, str))}
    pointers = sorted({kind for kind in kernel.src.signature.values() if kind.startswith("*")})
    name, warps = kernel.src.fn.__name__, kernel.metadata.num_warps
    return {
        "kernel": name,
        "module": kernel.src.fn.__module__,
        "case": case,
        "architecture": architecture,
        "variant": constants | {"pointers": " ".join(pointers), "warps": warps, "stages": kernel.metadata.num_stages},
        "products": len(re.findall(r"\btt\.dot\b", kernel.asm["ttir"])),
        "shared": kernel.metadata.shared,
        **{counted: len(re.findall(pattern, kernel.asm["ptx"])) for counted, pattern in INSTRUCTIONS.items()},
        **resources(name, kernel.asm["cubin"], constants, warps),
    }


def rows_of(rows: int, dim: int, learners: int, dtype: torch.dtype) -> Rows:
    """Embeddings with label and learner."""
    row = torch.arange(rows)
    return Rows(torch.randn(rows, dim).to(dtype).requires_grad_(), row // 4, row % learners)


def square(
    rows: int, dim: int, learners: int, dtype: torch.dtype = torch.float32, *, masks: bool = True, margin: float = MARGIN, **sampling: Any
) -> None:
    """A training step of a batch with itself, with fused masks or without."""
    given = torch.ones(learners, dim, requires_grad=True) if masks else None
    beta, drawn = torch.full((rows,), 1.2, requires_grad=True), Sampling(**{"max_positives": 3} | sampling)
    out = kernels.margin_loss(
        rows_of(rows, dim, learners, dtype), beta=beta, margin=margin, masks=given, num_learners=learners, sampling=drawn
    )
    out.loss_sum.backward()


def against_references(
    rows: int, references: int, dim: int, learners: int, dtype: torch.dtype = torch.float32, *, margin: float = MARGIN, **sampling: Any
) -> None:
    """A training step of local rows against the rows of all ranks."""
    own, others = (rows_of(n, dim, learners, dtype)._replace(row_ids=torch.arange(n)) for n in (rows, references))
    drawn = Sampling(max_positives=3, **sampling)
    kernels.margin_loss(own, others, beta=1.2, margin=margin, num_learners=learners, sampling=drawn).loss_sum.backward()


def in_parts(rows: int, dim: int, learners: int, pairs: int) -> None:
    """Projection, then the loss over a list of pairs."""
    given = rows_of(rows, dim, learners, torch.float32)
    z = kernels.project(given.z, given.learner, torch.ones(learners, dim, requires_grad=True))
    listed = Pairs(torch.arange(pairs) % rows, (7 * torch.arange(pairs)) % rows, torch.arange(pairs) % 2 == 0)
    beta = torch.full((), 1.2, requires_grad=True)
    out = kernels.margin_loss_on_pairs(given._replace(z=z), listed, beta=beta, num_learners=learners)
    out.loss_sum.backward()


def lloyd(rows: int, dim: int, centroids: int, dtype: torch.dtype, *, restrict: bool = False) -> None:
    """One step of k-means."""
    parent = torch.zeros(rows, dtype=torch.int64) if restrict else None
    kmeans.lloyd_step(torch.randn(rows, dim).to(dtype), torch.randn(centroids, dim), restrict=parent)


Case = tuple[str, Callable[[], None], Callable[[], None]]  # name, call, a call that must compile nothing new


def margin_cases() -> list[Case]:
    """What training calls, small and large; other numbers stay within one tile table entry and one bucket of K and P.

    With up to 16,384 anchors a GPU may split the race (race_splits.py); "not split" are sizes where none does.
    """
    half, full = torch.bfloat16, torch.float32
    other: dict[str, Any] = {"seed": 5, "step": 7, "margin": 0.3, "cutoff": 0.4, "nonzero_loss_cutoff": 1.3, "effective_dim": 100.0}
    return [
        ("small", lambda: square(128, 512, 4), lambda: square(97, 512, 3, **other)),
        ("medium", lambda: square(8192, 512, 4), lambda: square(8191, 512, 3, **other)),
        ("medium, not split", lambda: square(16000, 512, 4), lambda: square(15999, 512, 3, **other)),
        ("large", lambda: square(20000, 512, 4), lambda: square(19999, 512, 3, **other)),
        ("wide", lambda: square(512, 2048, 4), lambda: square(520, 2048, 3)),
        ("narrow", lambda: square(512, 64, 4), lambda: square(499, 64, 3)),
        ("bfloat16", lambda: square(1024, 512, 4, half), lambda: square(1000, 512, 3, half)),
        ("one learner", lambda: square(1024, 512, 1, masks=False), lambda: square(1000, 512, 1, masks=False)),
        *(
            (
                f"{name}, {size}",
                lambda rows=rows, given=given: square(rows, 512, 4, **given),
                lambda rows=rows, given=given: square(rows - 5, 512, 3, **given),
            )
            for size, rows in (
                ("small", 1024),
                ("small, not split", 200),
                ("medium", 8192),
                ("medium, not split", 16000),
                ("large", 20000),
            )
            for name, given in (("floors", {"mode": "reference"}), ("many positives", {"max_positives": 31}))
        ),
        *(
            (
                f"references, {dtype}",
                lambda dtype=dtype: against_references(1024, 8192, 512, 4, dtype),
                lambda dtype=dtype: against_references(1021, 8001, 512, 3, dtype, **other),
            )
            for dtype in (full, half)
        ),
        ("start of a run", lambda: probe.add_one(torch.zeros(3)), lambda: probe.add_one(torch.zeros(5))),
        ("in parts", lambda: in_parts(1024, 512, 4, 3000), lambda: in_parts(1023, 512, 3, 2999)),
    ]


def kmeans_cases() -> list[Case]:
    """Every route; another K stays within its bucket."""
    return [
        (
            f"{dtype}, D={dim}, K={centroids}{', restricted' if restrict else ''}",
            lambda given=(dim, centroids, dtype), restrict=restrict: lloyd(5000, *given, restrict=restrict),
            lambda given=(dim, centroids - 2, dtype), restrict=restrict: lloyd(4001, *given, restrict=restrict),
        )
        for dtype in (torch.bfloat16, torch.float32)
        for dim, centroids, restrict in ((512, 4, False), (512, 32, False), (512, 32, True), (2048, 32, False), (512, 1000, False))
    ]


FAMILIES: dict[str, Callable[[], list[Case]]] = {"margin": margin_cases, "kmeans": kmeans_cases}


def compile_family(task: tuple[str, int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Reports of a family's kernels on one architecture, and of those that the repetition with other numbers compiled anew."""
    family, architecture = task
    torch.set_num_threads(1)
    with Launches(architecture) as launches:
        cases = FAMILIES[family]()
        for launches.case, call, _ in cases:
            call()
        first = len(launches.compiled)
        for launches.case, _, repetition in cases:
            repetition()
    reports = [describe(kernel, case, architecture) for kernel, case in launches.compiled.values()]
    return reports[:first], reports[first:]


def compile_all(workers: int) -> dict[str, Any]:
    """The report: a line for every kernel that some case compiled, and for those that a repetition compiled anew."""
    started = time.monotonic()
    tasks = [(family, architecture) for family in FAMILIES for architecture in ARCHITECTURES]
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        found = pool.map(compile_family, tasks, chunksize=1)
    return {
        "triton": triton.__version__,
        "seconds": round(time.monotonic() - started, 1),
        "kernels": [line for lines, _ in found for line in lines],
        "recompiled": [line for _, lines in found for line in lines],
    }


def workers_option(description: str) -> int:
    """How many processes compile, from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    return parser.parse_args().workers


if __name__ == "__main__":
    print(json.dumps(compile_all(workers_option(__doc__.split("\n")[0])), indent=1))
