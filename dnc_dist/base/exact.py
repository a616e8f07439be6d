"""Numbers whose digits do not depend on how rows are spread over ranks, blocks or threads.

BLAS gives the same dot product different last digits for different numbers of rows and threads. Whatever decides between
rows (a nearest centroid, the order of neighbours) therefore ends in the functions here, which add in a fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor  # it takes seconds to import, and arrays need none of it

Values = TypeVar("Values", np.ndarray, "Tensor")

FLOAT32_ROUNDING = 2.0**-24


def squared_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances by direct difference in float64, added in an order that depends on D alone.

    Args:
        a: (..., D).
        b: (..., D), broadcast against ``a``.

    Returns:
        (...) float64; exactly 0 for equal vectors.
    """
    return squared_length(np.subtract(a, b, dtype=np.float64)).copy()


def squared_length(part: Values) -> Values:
    """Squared lengths of float64 vectors, added in an order that depends on D alone; it works in the memory of the vectors.

    Each step is one rounded operation, so an array and a tensor give the same digits, on any device.

    Args:
        part: (..., D), overwritten.

    Returns:
        (...), a view of ``part``.
    """
    part *= part
    width = part.shape[-1]
    while width > 1:
        half = (width + 1) // 2
        part[..., : width - half] += part[..., half:width]
        width = half
    return part[..., 0]


def gram_error(dim: int, norm_a: np.ndarray | float, norm_b: np.ndarray | float) -> np.ndarray | float:
    """A bound on the error of ``|a|^2 + |b|^2 - 2ab`` in float32, whatever the order of the sums (Higham 2002, section 3.1)."""
    return (dim + 8) * FLOAT32_ROUNDING * (norm_a + norm_b) ** 2


def contingency(first: np.ndarray, second: np.ndarray, num_first: int, num_second: int) -> np.ndarray:
    """How many rows carry each pair of numbers.

    Args:
        first: (N,) integers below ``num_first``; rows where either is negative are ignored.
        second: (N,) integers below ``num_second``.

    Returns:
        (num_first, num_second) int64.
    """
    known = (first >= 0) & (second >= 0)
    pairs = first[known].astype(np.int64) * num_second + second[known]
    return np.bincount(pairs, minlength=num_first * num_second).reshape(num_first, num_second)


def _entropy(counts: np.ndarray) -> float:
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def nmi(first: np.ndarray, second: np.ndarray) -> float:
    """Normalised mutual information of two groupings of the same rows, 2 I / (H + H) (arithmetic mean, as scikit-learn).

    Args:
        first: (N,) integers, any values.
        second: (N,) integers, any values.

    Returns:
        Between 0 and 1; 1 if both put all rows into one group.
    """
    if len(first) == 0:
        return 1.0
    _, a, count_a = np.unique(first, return_inverse=True, return_counts=True)
    _, b, count_b = np.unique(second, return_inverse=True, return_counts=True)
    if len(count_a) == len(count_b) == 1:
        return 1.0
    pair, count = np.unique(a.astype(np.int64) * len(count_b) + b, return_counts=True)
    expected = count_a[pair // len(count_b)].astype(np.float64) * count_b[pair % len(count_b)]
    mutual = float((count / len(first) * (np.log(count) + np.log(len(first)) - np.log(expected))).sum())
    return min(1.0, max(0.0, 2 * mutual / (_entropy(count_a) + _entropy(count_b))))
