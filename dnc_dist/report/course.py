"""How the test embedding came to be: the maps of several evaluations, turned so that a point can be followed from one to the next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dnc_dist.rundir.diagnosis import Diagnosis
from dnc_dist.rundir.maps import EmbeddingMap
from dnc_dist.rundir.record import RunRecord, number

_LEAST_SHARED = 3
"""Points that two maps must have in common to be turned onto each other."""


@dataclass(frozen=True, eq=False)
class Stop:
    """The map of one evaluation: what it is called, and where the images of the diagnosis lie in it."""

    epoch: int
    """Epochs that were done; 0: untrained."""
    trained: str
    """How many learners trained; or "untrained", or "conquer"; empty if that is not known."""
    recall: float | None
    points: np.ndarray  # (n, 2) float64; NaN where the image was not measured
    variance: float


def course_of(run: RunRecord, found: Diagnosis) -> list[Stop]:
    """The maps of the run in their order, that of the diagnosis last; only that one where the run has kept no others."""
    last = int(found.map_step[0])
    after = found.map_points.astype(np.float64)
    stops = [_stop(run, last, after, float(found.map_variance.sum()))]
    for step in sorted(run.maps, reverse=True):
        earlier = run.maps[step]
        points = turned(_in_order(earlier, found.map_rows), after)
        if points is None:
            continue
        stops.append(_stop(run, step, points, float(earlier.variance.sum())))
        after = points
    return stops[::-1]


def turned(points: np.ndarray, onto: np.ndarray) -> np.ndarray | None:
    """Points (n, 2), turned and mirrored about their mean so that they come as near as they can to others (n, 2); None where hardly any
    stand in both. Rows that one of them lacks are NaN there. It is the orthogonal Procrustes problem: no distance changes.
    """
    both = np.isfinite(points).all(1) & np.isfinite(onto).all(1)
    if both.sum() < _LEAST_SHARED:
        return None
    left, _, right = np.linalg.svd(points[both].T @ (onto[both] - onto[both].mean(0)))
    turn: np.ndarray = points @ (left @ right)
    return turn


def _in_order(found: EmbeddingMap, rows: np.ndarray) -> np.ndarray:
    """Where rows (n,) lie on a map: (n, 2) float64, NaN where it does not have them."""
    points = np.full((len(rows), 2), np.nan)
    _, here, there = np.intersect1d(rows, found.rows, return_indices=True)
    points[here] = found.points[there]
    return points


def _stop(run: RunRecord, step: int, points: np.ndarray, variance: float) -> Stop:
    lines = [line for line in run.of("evaluation") if line["step"] == step]
    # The division at the step of an evaluation is already that of the next epoch.
    learners = [number(line.get("num_learners")) for line in run.of("division") if line["step"] < step]
    epoch = int(lines[-1]["epoch"]) if lines else 0
    conquer = run.conquer_from is not None and epoch > run.conquer_from
    words = "untrained" if step == 0 else "conquer" if conquer else ""
    if not words and learners and learners[-1] is not None:
        words = f"{learners[-1]:.0f} learner{'s' if learners[-1] != 1 else ''}"
    return Stop(epoch, words, number(lines[-1].get("recall@1")) if lines else None, points, variance)
