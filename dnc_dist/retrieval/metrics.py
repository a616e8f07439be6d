"""What the places of its relevant rows are worth to a query; means are taken elsewhere, over all queries in one canonical order.

``places`` (q, k) int64 are the places of the nearest k gallery rows of the query's class in its ranking, from 1, ascending;
``relevant`` (q,) counts all of these rows, the query excluded. Only places up to ``relevant`` matter.
"""

from __future__ import annotations

import numpy as np

from dnc_dist.base.exact import nmi

__all__ = ["average_precision_at_r", "nmi", "r_precision"]


def _within_r(places: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    if len(relevant) and not 1 <= relevant.min() <= relevant.max() <= places.shape[1]:
        raise ValueError(f"{relevant.min()} to {relevant.max()} relevant rows, but {places.shape[1]} places; leave queries without any out")
    return places <= relevant[:, None]


def average_precision_at_r(places: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """(q,) float64: precision at each hit within the first R neighbours, divided by R (Musgrave et al. 2020, equation 3)."""
    precision = np.arange(1, places.shape[1] + 1) / places
    return np.where(_within_r(places, relevant), precision, 0.0).sum(1) / relevant


def r_precision(places: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """(q,) float64: share of same-class rows among the first R neighbours."""
    return _within_r(places, relevant).sum(1) / relevant
