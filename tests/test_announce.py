"""What a run says at its start about what happens when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dnc_dist.engine.announce import phases
from tests.engine_fixtures import config


@pytest.mark.parametrize(
    ("division", "epochs", "said"),
    [
        ({"num_learners": 1}, 5, "5 epoch(s) with one learner"),
        (
            {"every": 2},
            12,
            "12 epoch(s): 1 learner, twice as many every 2 epoch(s), all 4 from epoch 4 on; "
            "the whole embedding from epoch 6 on, with batches from clusters",
        ),
        (
            {"every": 2, "distill": 50.0},
            12,
            "12 epoch(s): 1 learner, twice as many every 2 epoch(s), all 4 from epoch 4 on; "
            "the whole embedding from epoch 6 on, with batches from clusters, taught by the learners (weight 50)",
        ),
        (
            {"mode": "flat", "conquer_batches": "whole"},
            9,
            "9 epoch(s): 4 learners from the start, divided anew every 1 epoch(s); "
            "the whole embedding from epoch 4 on, with batches from the whole training set",
        ),
        (
            {},
            3,
            "3 epoch(s): 1 learner, twice as many every 1 epoch(s), all 4 from epoch 2 on; "
            "the whole embedding is never trained together: 3 epoch(s) are too few, 4 are the least (division.conquer_from)",
        ),
        (
            {"conquer_from": None},
            9,
            "9 epoch(s): 1 learner, twice as many every 1 epoch(s), all 4 from epoch 2 on; "
            "the whole embedding is never trained together (division.conquer_from)",
        ),
    ],
)
def test_the_phases_in_words(division: dict[str, Any], epochs: int, said: str, tmp_path: Path) -> None:
    assert phases(config(tmp_path, tmp_path / "run", division=division, schedule={"epochs": epochs})) == said
