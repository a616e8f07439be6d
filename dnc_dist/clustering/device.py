"""Lloyd's k-means on the device, with the fused Lloyd step; starts, splits and results are those of the CPU.

The host reads what a step found only when the next step is under way, so the device never waits for it: a step that began
before the host knew that no row moves, or that a cluster is empty, is thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.clustering.centroids import Backend, KMeansOptions, KMeansResult, first_centroids, settled, split_empty
from dnc_dist.clustering.features import Collective, Features
from dnc_dist.processes.transfer import Later
from dnc_kernels import implementation, implementation_note, lloyd_step

BLOCK_ELEMENTS = 1 << 24


def choose_backend(backend: Backend, device: torch.device) -> Literal["triton", "faiss", "numpy"]:
    """What runs k-means on rows of this device: for ``auto`` Triton on a GPU that it serves, else NumPy on the CPU.

    Raises:
        InputError: Triton is asked for where it does not run.
    """
    if backend in ("faiss", "numpy"):
        return backend
    if backend == "auto" and device.type != "cuda":
        return "numpy"
    if implementation(device) == "triton":
        return "triton"
    if backend == "auto":
        return "numpy"
    raise InputError(
        f"division.kmeans_backend=triton does not run on device {device} ({implementation_note(device)}); "
        "set division.kmeans_backend to auto, faiss or numpy"
    )


class _Step(NamedTuple):
    """A Lloyd step that may still be running."""

    centroids: Tensor  # (k, D) float32 before the step
    assignment: Tensor  # (n,) int64 to these centroids
    updated: Tensor  # (k, D) float32 after it; an empty cluster keeps its centroid
    found: Later  # (k + 2,) float64: rows of every cluster, objective, rows that moved, over all ranks


def lloyd_on_device(
    features: Features,
    k: int,
    seed: int,
    options: KMeansOptions,
    init: Tensor | None,
    restrict: Tensor | None,
    beat: Callable[[], None],
) -> KMeansResult:
    """Collective. k-means of the rows (n, D) of this rank on their device; arguments, result and errors as ``kmeans``."""
    x, all_reduce = features.local.detach().float().contiguous(), features.all_reduce
    parent = np.zeros(len(x), np.int64) if restrict is None else restrict.cpu().numpy().astype(np.int64)
    parents = 1 if restrict is None else k // 2
    broken = int((~torch.linalg.vector_norm(x, torch.inf, dim=1).isfinite()).sum())
    head = np.append(np.bincount(parent, minlength=parents), broken)
    head = all_reduce(torch.from_numpy(head).to(x.device)).cpu().numpy()
    if head[-1]:
        raise RunError(f"{head[-1]} rows hold values that are not finite, so the model has diverged; lower optim.lr")
    rows_of_parent = head[:-1]
    if init is None:
        init = first_centroids(features._replace(local=x), parent, rows_of_parent, k // parents, seed, beat)
    own = None if restrict is None else torch.from_numpy(parent).to(x.device)
    energy = torch.stack([block.double().square().sum() for block in x.split(max(1, BLOCK_ELEMENTS // x.shape[1]))]).sum()

    def start(centroids: Tensor, previous: Tensor) -> _Step:
        return _start(x, energy, centroids, own, previous, all_reduce)

    step = start(init.detach().to(x.device, torch.float32), torch.full((len(x),), -1, device=x.device))
    objective, splits = math.nan, 0
    for iteration in range(options.iterations):
        beat()
        ahead = start(step.updated, step.assignment)
        *counts, now, moved = step.found.read().tolist()
        before, objective = objective, max(0.0, now)
        if moved == 0 or settled(before, objective, options.tolerance):
            break
        if not all(counts):
            centroids = step.updated.cpu().numpy()
            split = split_empty(centroids, np.array(counts, np.int64), rows_of_parent, seed, iteration)
            if split:
                splits, objective = splits + split, math.nan
                ahead = start(torch.from_numpy(centroids).to(x.device), step.assignment)
        step = ahead
    else:
        iteration = options.iterations
    distance = _squared_distance(x, step.centroids, step.assignment)
    objective = float(all_reduce(distance.sum(dtype=torch.float64)[None]))
    return KMeansResult(step.assignment.cpu(), distance.cpu(), step.centroids.cpu(), objective, iteration, splits)


def _start(x: Tensor, energy: Tensor, centroids: Tensor, parent: Tensor | None, previous: Tensor, all_reduce: Collective) -> _Step:
    """Collective. Enqueue a step: one pass over x, one all-reduce of sums (k, D), counts (k,), objective and the number of moved rows."""
    k, width = centroids.shape
    assignment, _, sums, counts = lloyd_step(x, centroids, restrict=parent)
    moved = (assignment != previous).sum(dtype=torch.float64)
    c = centroids.double()
    objective = energy - (c * (2 * sums - counts[:, None] * c)).sum()
    packed = all_reduce(torch.cat([sums.flatten(), counts.double(), objective[None], moved[None]]))
    total = packed[: k * width].view(k, width)
    size = packed[k * width : -2, None]
    updated = torch.where(size > 0, total / size.clamp_min(1), c).float()
    return _Step(centroids, assignment, updated, Later(packed[k * width :]))


def _squared_distance(x: Tensor, centroids: Tensor, assignment: Tensor) -> Tensor:
    """(n,) float32 squared distance of every row to its centroid, by direct difference."""
    distance = torch.empty(len(x), device=x.device)
    size = max(1, BLOCK_ELEMENTS // x.shape[1])
    for at in range(0, len(x), size):
        block = slice(at, at + size)
        distance[block] = (x[block] - centroids[assignment[block]]).square().sum(1)
    return distance
