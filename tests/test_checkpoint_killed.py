"""Runs that end while a checkpoint is written beside training: killed, or with a full disk; they go on from the one before."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dnc_dist.engine.zero import checkpoint, read_model
from dnc_dist.rundir.checkpoints import tag_of
from tests.run_fixtures import (
    assert_same_run,
    end_ranks,
    last_step,
    make_dataset,
    metrics,
    start_ranks,
    wait_until,
    without_report,
    write_config,
)
from tests.test_checkpoint_writing import no_space

STEPS_PER_EPOCH = 8
IN_FLIGHT = 12
"""The step whose checkpoint is written when something happens; the one before it is of the end of an epoch."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset and a configuration with everything random, and for 1 and 2 processes the run ``whole-W`` that nobody disturbed."""
    folder = tmp_path_factory.mktemp("writing")
    write_config(
        folder,
        make_dataset(folder),
        data={"augment": "color"},
        loss={"name": "margin", "memory": 96, "memory_from": 1},
        checkpoint={"every_steps": 4, "keep": 2},
    )
    for world in (1, 2):
        result = end_ranks(train(folder, f"whole-{world}", world)).result
        (folder / f"{world}.json").write_text(json.dumps(result))
    return folder


def train(place: Path, name: str, world: int, last: Callable[[], None] = without_report) -> list[Any]:
    """Start a run; ``last`` is called before it in the process of the last rank."""
    arguments = ["train", "run.yaml", "--set", f"run.name={name}"]
    return start_ranks(arguments, place, world, before=without_report, before_on={world - 1: last})


def then_in_the_background(happens: Callable[[], Any], run: str, until: int) -> None:
    """For ``before``: while the checkpoint of step ``IN_FLIGHT`` is written, something happens once training came to a further step."""
    without_report()
    write = checkpoint._write

    def writing(folder: Path, files: Any) -> list[Path]:
        paths = write(folder, files)
        if tag_of(IN_FLIGHT) in folder.name:
            wait_until(lambda: last_step(Path(run)) >= until)
            happens()
        return paths

    checkpoint._write = writing


def dies() -> None:
    os.killpg(0, signal.SIGKILL)


def assert_goes_on(place: Path, name: str, world: int) -> None:
    """From the checkpoint before, and to the same curve."""
    run = place / "runs" / name
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-00000004", "step-00000008"]
    assert (run / "checkpoints" / "latest").read_text() == "step-00000008"
    done = end_ranks(train(place, name, world))
    assert "resumed in epoch 1, after step 8\n" in done.out
    assert done.result | {"run": ""} == json.loads((place / f"{world}.json").read_text()) | {"run": ""}
    assert_same_run(run, place / "runs" / f"whole-{world}")
    assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert read_model(run / "checkpoints" / "step-00000032").state.step == 4 * STEPS_PER_EPOCH


@pytest.mark.parametrize("world", [1, 2])
def test_killed_while_it_is_written(world: int, place: Path) -> None:
    """Of two ranks the other one, which has written its files but has not said so."""
    name = f"killed-{world}"
    ranks = train(place, name, world, partial(then_in_the_background, dies, f"runs/{name}", IN_FLIGHT + 2))
    assert ranks[-1].wait().code == -signal.SIGKILL and all(rank.wait().code != 0 for rank in ranks)
    # Training went on.
    assert last_step(place / "runs" / name) >= IN_FLIGHT + 2
    assert_goes_on(place, name, world)


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_while_it_is_written(world: int, place: Path) -> None:
    """All ranks end with the message, soon after; of two ranks the disk of the other one is full."""
    name = f"full-{world}"
    ranks = train(place, name, world, partial(then_in_the_background, no_space, f"runs/{name}", IN_FLIGHT + 1))
    done = end_ranks(ranks)
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith(
        f"error: runs/{name}/checkpoints/step-00000012 cannot be written (No space left on device), "
    ), done.err
    assert done.err.count("error: ") == 1 and "Traceback" not in done.err
    # The step after which it failed, one in which the ranks agree, and one in which they read that.
    steps = [line["step"] for line in metrics(place / "runs" / name, "train")]
    assert IN_FLIGHT + 1 <= max(steps) < 2 * STEPS_PER_EPOCH
    assert_goes_on(place, name, world)
