"""What ranked neighbours are worth, per query; means are taken elsewhere, over all queries in one canonical order.

``matches`` (q, k) bool says whether the i-th nearest neighbour has the query's label; ``relevant`` (q,) counts the gallery
rows of the query's class, the query excluded.
"""

from __future__ import annotations

import numpy as np

from dnc_dist.base.exact import nmi

__all__ = ["average_precision_at_r", "first_match", "nmi", "r_precision"]


def first_match(matches: np.ndarray) -> np.ndarray:
    """(q,) rank, from 1, of the first neighbour of the same class; k + 1 if there is none. A hit for recall@n if it is at most n."""
    return np.where(matches.any(1), matches.argmax(1), matches.shape[1]) + 1


def _within_r(matches: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    if len(relevant) and not 1 <= relevant.min() <= relevant.max() <= matches.shape[1]:
        raise ValueError(
            f"{relevant.min()} to {relevant.max()} relevant rows, but {matches.shape[1]} neighbours; leave queries without any out"
        )
    return matches & (np.arange(matches.shape[1]) < relevant[:, None])


def average_precision_at_r(matches: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """(q,) float64: precision at each hit within the first R neighbours, divided by R (Musgrave et al. 2020, equation 3)."""
    hits = _within_r(matches, relevant)
    precision = np.cumsum(hits, 1) / np.arange(1, matches.shape[1] + 1)
    return np.where(hits, precision, 0.0).sum(1) / relevant


def r_precision(matches: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """(q,) float64: share of same-class rows among the first R neighbours."""
    return _within_r(matches, relevant).sum(1) / relevant
