"""The least time that a step can take on a machine, from what the machine was measured to do (`kernels/README.md` derives it).

There are three times: bytes over bandwidth, operations over the rate of the matrix units, instructions over the rate of the
scalar units. Work that overlaps takes the largest of the three. Phases that follow each other add up.
"""

from __future__ import annotations

from typing import Any

INSTRUCTIONS_PER_PAIR = 75.0  # of the sampler: Philox, three logarithms, running selection
PRODUCTS = {"float32": 3, "bfloat16": 1}  # bfloat16 products that make one of this accuracy
ONE_HOT_UP_TO = 64  # centroids: beyond, k-means adds up its rows in a second pass instead of a second product


def _milliseconds(seconds: dict[str, float]) -> dict[str, Any]:
    largest = max(seconds, key=seconds.__getitem__)
    return {f"{name}_ms": float(f"{1e3 * value:.3g}") for name, value in seconds.items()} | {"bound": largest}


def margin_step(case: Any, ceilings: dict[str, float]) -> dict[str, Any]:
    """Of project, sample, loss and backward, float32, K equal learners.

    Sampling: every embedding is read, z written and read (live columns), and each pair inside a learner costs a product of the live
    width and the sampler's instructions. Afterwards the gradient is written whole, and rows are gathered: 2P for the loss, 4P for the
    gradient (each pair serves both its rows) and the embedding itself; gathers are free where z stays in the cache.
    """
    rows, live, float32 = case.rows, case.live, 4.0
    pairs = rows * rows / case.learners
    gathered = rows * (6 * case.positives + 1) * live * float32
    sampling = {
        "memory": 3 * rows * live * float32 / ceilings["copy"],
        "matrix": 2 * pairs * live * PRODUCTS["float32"] / ceilings["matrix"],
        "scalar": pairs * INSTRUCTIONS_PER_PAIR / ceilings["scalar"],
    }
    backward = (rows * case.dim * float32 + (gathered if rows * live * float32 > ceilings["cache"] else 0.0)) / ceilings["copy"]
    parts = _milliseconds(sampling)
    return parts | {"backward_ms": float(f"{1e3 * backward:.3g}"), "total_ms": float(f"{1e3 * (max(sampling.values()) + backward):.3g}")}


def lloyd_step(rows: int, dim: int, centroids: int, dtype: str, ceilings: dict[str, float]) -> dict[str, Any]:
    """Of one iteration: x is read once; products for the distances and, for few centroids, for the sums."""
    padded = max(16, centroids)
    products = (2 if centroids <= ONE_HOT_UP_TO else 1) * PRODUCTS[dtype]
    seconds = {
        "memory": rows * dim * (2.0 if dtype == "bfloat16" else 4.0) / ceilings["copy"],
        "matrix": 2.0 * rows * padded * dim * products / ceilings["matrix"],
    }
    return _milliseconds(seconds) | {"total_ms": float(f"{1e3 * max(seconds.values()):.3g}")}
