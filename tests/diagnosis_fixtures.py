"""A diagnosis as an evaluation leaves it, with everything in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from dnc_dist.rundir.diagnosis import Diagnosis

PICTURES, MISSES, LEARNERS, SAMPLE, POINTS, DIM = 30, 8, 4, 40, 25, 16
NAMES = ["u0041", "u0391", "teapot", "a class with quite a long name", "green <b>"]


def make_diagnosis(*, learners: int = LEARNERS, side: int = 16, **changes: Any) -> Diagnosis:
    """Eight misses of five classes, two confused pairs, one hub."""
    generator = np.random.default_rng(0)

    def image(count: int, size: int) -> np.ndarray:
        return generator.integers(0, 255, (count, size, size, 3), dtype=np.uint8)

    def coin(*shape: int) -> np.ndarray:
        return generator.random(shape) < 0.4

    labels = np.arange(PICTURES) % 5
    masks = np.zeros((learners, DIM), np.float32)
    for learner in range(learners):
        masks[learner, learner * DIM // learners : (learner + 1) * DIM // learners + 2] = 1 + generator.random()
    sample = SAMPLE if learners else 0
    found = Diagnosis(
        counts=np.array([400, 100]),
        rank_counts=np.array([300, 40, 30, 10, 15, 3, 2]),
        distance_edges=np.linspace(0, 1, 11).astype(np.float32),
        distance_counts=generator.integers(0, 60, (2, 10)),
        twins=np.array([3]),
        rows=1000 + np.arange(PICTURES),
        labels=labels,
        names=np.array([NAMES[label] for label in labels]),
        sources=np.array([f"test/{NAMES[label]}/{number:02d}.jpg" for number, label in enumerate(labels)]),
        images=image(PICTURES, side),
        queries=np.arange(MISSES),
        nearest=np.arange(MISSES) + 8,
        distances=np.linspace(0.001, 0.4, MISSES).astype(np.float32),
        own=np.where(np.arange(MISSES) == 2, -1, np.arange(MISSES) + 15),
        own_distances=np.linspace(0.3, 0.9, MISSES).astype(np.float32),
        first_hits=np.array([0, 300, 0, 20, 7, 2, 3, 2]),
        agreeing=np.stack([np.array([5, 4, 1, 2, 5, 3, 5, 5]), np.full(MISSES, 5)], 1),
        alone=coin(MISSES, learners),
        worst=np.array([2, 0, 1, 3]),
        alike=np.array([0, 1]),
        mislabelled=np.array([0, 4]),
        pair_counts=np.array([[12, 5], [3, 0]]),
        pair_queries=np.array([[80, 80], [80, 75]]),
        pair_examples=np.array([[0, 5, -1], [1, -1, -1]]),
        hubs=np.array([9]),
        hub_counts=np.array([[6, 3, 1]]),
        hub_examples=np.array([[6, 7, -1]]),
        sampled_right=coin(sample),
        sampled_alone=coin(sample, learners),
        sampled_learner=np.arange(sample) % max(1, learners),
        missed_alone=coin(sample // 2, learners),
        masks=masks,
        clusters=np.array([[500.0 - learner, 40, 30, 0.75] for learner in range(learners)], np.float32).reshape(-1, 4),
        montage=np.array([[20, 21, 22, -1]] * learners, np.int64).reshape(learners, -1 if learners else 0),
        map_points=generator.normal(size=(POINTS, 2)).astype(np.float32),
        map_labels=np.arange(POINTS) % 5,
        map_names=np.array([NAMES[label] for label in np.arange(POINTS) % 5]),
        map_right=coin(POINTS),
        map_images=image(POINTS, 8),
        map_variance=np.array([0.3, 0.1], np.float32),
        map_rows=2000 + np.arange(POINTS),
        map_step=np.array([9]),
    )
    return replace(found, **changes)
