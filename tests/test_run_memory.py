"""A run with cross-batch memory ends in the middle and goes on: bit for bit, and on another number of processes from the same ring."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.rounding import NEIGHBOUR
from tests.run_fixtures import assert_same_run, end_ranks, last_step, make_dataset, metrics, write_config
from tests.test_run_elastic import train

STEPS_PER_EPOCH, ROWS, MEMORY = 8, 16, 96
CONQUER = 3 * STEPS_PER_EPOCH
END = 4 * STEPS_PER_EPOCH


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, a configuration, and the run ``whole`` that nobody disturbed: 1, 2 and 4 learners, then conquer."""
    folder = tmp_path_factory.mktemp("memory")
    write_config(
        folder,
        make_dataset(folder),
        loss={"name": "margin", "memory": MEMORY, "memory_from": 2},
        division={"learners_per_step": 2},
        evaluation={"every": 4, "nmi": "never"},
        checkpoint={"every_steps": 4, "keep": 50},
    )
    end_ranks(train(folder, "whole", 1))
    assert last_step(folder / "runs" / "whole") == END
    return folder


def ring(run: Path, step: int) -> dict[str, Tensor]:
    """The memory in a checkpoint."""
    model = torch.load(run / "checkpoints" / f"step-{step:08d}" / "mp_rank_00_model_states.pt", weights_only=True)
    return {name.removeprefix("loss.memory."): value for name, value in model["module"].items() if name.startswith("loss.memory.")}


def resumed(place: Path, step: int, world: int) -> Path:
    """The run that goes on from a checkpoint of ``whole`` to its end."""
    name = f"from-{step}-on-{world}"
    shutil.copytree(place / "runs" / "whole", place / "runs" / name)
    end_ranks(train(place, name, world, "--resume", f"runs/{name}/checkpoints/step-{step:08d}"))
    return place / "runs" / name


def test_the_ring_of_a_run(place: Path) -> None:
    """Only rows since the last division, or since the conquer phase began, of the learners that then were."""
    held = {step: ring(place / "runs" / "whole", step)["learner"] for step in range(4, END + 1, 4)}
    # The first two steps keep nothing; the second division comes after step 8, the third after 16, and the conquer phase after 24.
    kept_steps = {4: 2, 8: 6, 12: 4, 16: 8, 20: 4, 24: 8, 28: 4, 32: 8}
    for step, learner in held.items():
        # A learner may have fewer rows than its share of a step.
        assert 0 < int((learner >= 0).sum()) <= min(MEMORY, ROWS * kept_steps[step]), step
        learners = set(range({0: 1, 1: 2, 2: 4, 3: 1}[(step - 1) // STEPS_PER_EPOCH]))
        assert set(learner[learner >= 0].tolist()) == learners, step


@pytest.mark.parametrize("step", [12, CONQUER, CONQUER + 4])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(place: Path, step: int) -> None:
    """In mid-epoch with a half-filled ring, which must not be emptied once more; where it is emptied; and in the conquer phase."""
    run, whole = resumed(place, step, 1), place / "runs" / "whole"
    assert_same_run(run, whole)
    found, expected = ring(run, END), ring(whole, END)
    assert found.keys() == expected.keys() == {"z", "labels", "learner", "next"}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_another_number_of_processes_goes_on_from_the_same_ring(place: Path) -> None:
    """The first step has equal weights and an equal ring: its loss differs by the rounding of one forward pass."""
    step, whole = 12, place / "runs" / "whole"
    run = resumed(place, step, 2)
    found, expected = ({line["step"]: line for line in metrics(each, "train")} for each in (run, whole))
    first, wanted = found[step + 1], expected[step + 1]
    assert abs(first["loss"] - wanted["loss"]) <= 4 * NEIGHBOUR * max(line["loss"] for line in expected.values())
    assert last_step(run) == END
    after, expected_after = ring(run, step + 4), ring(whole, step + 4)
    assert torch.equal(after["learner"], expected_after["learner"])
    # What four steps have not overwritten is what the other number of processes left there.
    assert int((after["z"] == expected_after["z"]).all(1).sum()) >= MEMORY - 4 * ROWS
