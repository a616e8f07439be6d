"""A run that ends in the middle, in whatever way, goes on to the same curve: bit for bit on the CPU, no step logged twice or missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dnc_dist.base.errors import InputError
from dnc_dist.rundir.checkpoints import Checkpoints
from tests.run_fixtures import (
    Running,
    assert_same_run,
    dnc,
    glyphs_on_two_processes,
    killed_when_writing,
    last_step,
    make_dataset,
    metrics,
    signalled_in,
    start,
    wait_until,
    with_small_files,
    without_report,
    write_config,
)
from tests.wandb_records import read_finished_run

STEPS_PER_EPOCH = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, a configuration with everything random, and the run ``whole`` that nobody disturbed."""
    folder = tmp_path_factory.mktemp("resume")
    write_config(
        folder,
        make_dataset(folder),
        data={"augment": "color", "workers": 2, "validation_classes": 0.25},
        evaluation={"at_start": True, "nmi": "every"},
        checkpoint={"every_steps": 4, "keep": 2},
    )
    done = train(folder, "whole", "--set", "checkpoint.keep=50").wait()
    (folder / "result.json").write_text(json.dumps(done.result))
    assert last_step(folder / "runs" / "whole") == 4 * STEPS_PER_EPOCH
    return folder


def train(place: Path, name: str, *arguments: str, before: Callable[[], None] = without_report) -> Running:
    return start(["train", "run.yaml", "--set", f"run.name={name}", *arguments], place, before=before)


def tags(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def assert_ends_as_whole(place: Path, name: str, *arguments: str) -> str:
    """Resume the run, let it end, and compare everything with the undisturbed run; what it said."""
    done = train(place, name, *arguments).wait()
    assert done.result | {"run": "runs/whole"} == json.loads((place / "result.json").read_text())
    assert_same_run(place / "runs" / name, place / "runs" / "whole")
    return done.out


@pytest.mark.slow
def test_two_epochs_and_two_are_four(place: Path) -> None:
    """From the checkpoint of the undisturbed run after two epochs."""
    shutil.copytree(place / "runs" / "whole", place / "runs" / "two")
    said = assert_ends_as_whole(place, "two", "--resume", "runs/two/checkpoints/step-00000012")
    assert "resumed in epoch 2, after step 12\n" in said


@pytest.mark.slow
def test_what_came_after_a_chosen_checkpoint_is_abandoned(place: Path) -> None:
    """From a checkpoint inside an epoch: later checkpoints must neither count among the newest nor be the best."""
    run = place / "runs" / "eight"
    shutil.copytree(place / "runs" / "whole", run)
    path = "runs/eight/checkpoints/step-00000008"
    done = train(place, "eight", "--resume", path, before=partial(signalled_in, "divide", 12, signal.SIGTERM)).wait()
    assert done.code == 75 and (run / "checkpoints" / "latest").read_text() == "step-00000012" == max(tags(run))
    assert re.search(r"rank 0: stopped: .*; saved runs/\S+, ", (run / "log.txt").read_text()) and done.out.count("stopped: ") == 0
    assert {"step-00000008", "step-00000012"} <= set(tags(run)) and last_step(run) == 12
    assert not (run / "checkpoints" / "best").exists() or (run / "checkpoints" / "best").read_text() in tags(run)
    assert "resumed in epoch 2, after step 12\n" in assert_ends_as_whole(place, "eight")


@pytest.mark.slow
def test_killed_again_and_again(place: Path) -> None:
    """SIGKILL before the first checkpoint; a full disk; SIGKILL while a checkpoint is written, between its rename and the
    pointer, and in mid-epoch; then a damaged file."""
    run = place / "runs" / "killed"

    young = train(place, "killed")
    young.wait_until(lambda: last_step(run) >= 2)
    young.kill()
    assert not (run / "checkpoints" / "latest").exists() and (run / "config.yaml").exists()

    full = train(place, "killed", before=partial(with_small_files, 500_000)).wait()
    assert full.code == 1 and "checkpoints/step-00000004 cannot be written" in full.err.splitlines()[-1]
    assert tags(run) == []

    assert train(place, "killed", before=partial(killed_when_writing, "files.json", "step-00000008")).wait().code == -signal.SIGKILL
    assert tags(run)[-1] == "step-00000006" and last_step(run) >= 8

    assert train(place, "killed", before=partial(killed_when_writing, "latest", "step-00000012")).wait().code == -signal.SIGKILL
    assert tags(run)[-1] == "step-00000012" and (run / "checkpoints" / "latest").read_text() == "step-00000008"

    old = train(place, "killed")
    # Published, too: it is written while training goes on.
    old.wait_until(lambda: last_step(run) >= 17 and (run / "checkpoints" / "latest").read_text() >= "step-00000016")
    old.kill()
    assert tags(run)[-1] == "step-00000016" and last_step(run) < 24

    model = run / "checkpoints" / "step-00000016" / "mp_rank_00_model_states.pt"
    os.truncate(model, model.stat().st_size // 2)
    said = assert_ends_as_whole(place, "killed")
    assert "step-00000016 is damaged (mp_rank_00_model_states.pt has" in said and "resumed in epoch 2, after step 12\n" in said


def flip_bit(path: Path, position: int) -> None:
    """Of a file, counted in bits."""
    content = bytearray(path.read_bytes())
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)


def test_a_flipped_bit_in_the_newest_checkpoint(place: Path) -> None:
    """The sizes are right, and torch would read it: the one before is used. A checkpoint that was chosen by name is refused."""
    run = place / "runs" / "flipped"
    shutil.copytree(place / "runs" / "whole", run)
    newest = run / "checkpoints" / "step-00000024"
    optimizer = newest / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.load(optimizer, weights_only=True)
    flip_bit(optimizer, 4 * optimizer.stat().st_size)
    torch.load(optimizer, weights_only=True)
    evaluated = dnc("evaluate", "runs/flipped", "--checkpoint", "last", "--json", folder=place)
    damage = f"checkpoint runs/flipped/checkpoints/{newest.name} is damaged ({optimizer.name} holds other bytes than were written)"
    assert evaluated.err.count(f"{damage}; not used\n") == 1 and json.loads(evaluated.out)["checkpoint"] == "step-00000020"
    chosen = train(place, "flipped", "--resume", f"runs/flipped/checkpoints/{newest.name}").wait()
    assert damage in chosen.error and "choose another one" in chosen.error
    said = assert_ends_as_whole(place, "flipped")
    assert said.count(f"{damage}; not used\n") == 1 and "resumed in epoch 3, after step 20\n" in said


def test_any_flipped_bit_is_found(place: Path) -> None:
    checkpoints = Checkpoints(place / "runs" / "whole", keep=50)
    folder = checkpoints.folder / "step-00000008"
    assert checkpoints.find(folder.name) == (folder.name, [])
    generator = np.random.default_rng(0)
    for file in folder.iterdir():
        bits = 8 * file.stat().st_size
        # All of the small file that the others are checked by.
        for position in range(bits) if file.name == "files.json" else generator.integers(bits, size=10).tolist():
            flip_bit(file, position)
            with pytest.raises(InputError, match=f"is damaged .{file.name}|is damaged .* is missing|holds other|instead of"):
                checkpoints.find(folder.name)
            flip_bit(file, position)
    assert checkpoints.find(folder.name) == (folder.name, [])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment(seed: int, place: Path) -> None:
    moments = np.random.default_rng(seed).uniform(0.1, 3.0, 15)
    name = f"soak-{seed}"
    for moment in moments.tolist():
        running = train(place, name)
        time.sleep(moment)
        if not running.alive():
            break
        running.kill()
    assert_ends_as_whole(place, name)


@pytest.mark.slow
def test_a_run_keeps_the_last_checkpoints_and_the_best(place: Path) -> None:
    run = place / "runs" / "killed"
    evaluations = [line for line in metrics(run, "evaluation") if line["step"]]
    best = max(evaluations, key=lambda line: line["validation/recall@1"])
    assert (run / "checkpoints" / "best").read_text() == f"step-{best['step']:08d}"
    assert tags(run) == sorted({"step-00000020", "step-00000024", f"step-{best['step']:08d}"})
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []
    result = json.loads((place / "result.json").read_text())
    assert result["selected_on"] == "validation" and result["recall@1"] == best["recall@1"]
    for choice, line in (("best", best), ("last", evaluations[-1])):
        found = json.loads(dnc("evaluate", "runs/killed", "--checkpoint", choice, "--json", folder=place).out)
        assert {name: found[name] for name in ("recall@1", "map@r", "nmi")} == {name: line[name] for name in ("recall@1", "map@r", "nmi")}


def test_stopped_by_signals(place: Path) -> None:
    """Ctrl-C before the first step, SIGTERM in an epoch, SIGUSR1 in a division, SIGUSR2 in an evaluation: each saves and exits 75."""
    run = place / "runs" / "stopped"
    assert train(place, "stopped", before=partial(signalled_in, "evaluate", 0, signal.SIGINT)).wait().code == 75
    assert tags(run) == ["step-00000000"]

    first = train(place, "stopped")
    first.wait_until(lambda: last_step(run) >= 2)
    first.signal(signal.SIGTERM)
    done = first.wait()
    assert done.code == 75
    saved = (run / "checkpoints" / "latest").read_text()
    assert done.err.splitlines()[-1].startswith("stopped: ") and f"saved runs/stopped/checkpoints/{saved}" in done.err
    assert int(saved.removeprefix("step-")) == last_step(run) < STEPS_PER_EPOCH * 2

    for phase, step, number in (("divide", 12, signal.SIGUSR1), ("evaluate", 18, signal.SIGUSR2)):
        done = train(place, "stopped", before=partial(signalled_in, phase, step, number)).wait()
        assert done.code == 75 and "Traceback" not in done.err
        assert (run / "checkpoints" / "latest").read_text() == f"step-{step:08d}"
    assert_ends_as_whole(place, "stopped")


def test_flat_division_and_sparse_lines(place: Path) -> None:
    """Stopped in the division before any step, then killed; a line every five steps, which a checkpoint between them breaks up."""
    write_config(
        place,
        place / "data",
        "flat",
        division={"mode": "flat", "num_learners": 2, "conquer_from": None},
        schedule={"epochs": 1},
        checkpoint={"every_steps": 3},
        tracker={"log_every": 5},
    )
    stop = dnc("train", "flat.yaml", folder=place, before=partial(signalled_in, "divide", 0, signal.SIGTERM))
    assert stop.code == 75 and tags(place / "runs" / "flat") == ["step-00000000"]
    kill = dnc("train", "flat.yaml", folder=place, before=partial(killed_when_writing, "files.json", "step-00000006"))
    assert kill.code == -signal.SIGKILL
    ended = dnc("train", "flat.yaml", folder=place, before=without_report).result
    whole = dnc("train", "flat.yaml", "--set", "run.name=again", folder=place, before=without_report).result
    assert ended | {"run": ""} == whole | {"run": ""}
    assert_same_run(place / "runs" / "flat", place / "runs" / "again")
    assert [line["step"] for line in metrics(place / "runs" / "flat", "train")] == [3, 5, 6, 8]


def without_a_pass() -> None:
    """For ``before``: nothing may be divided."""
    without_report()
    from dnc_dist.engine import trainer

    del trainer.next_division


@pytest.mark.parametrize("learners", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_groups_of_classes_go_on_without_another_pass(learners: int, place: Path) -> None:
    """Killed in mid-epoch, in an epoch with groups that an earlier one made."""
    name = f"groups{learners}"
    write_config(
        place,
        place / "data",
        name,
        division={
            "mode": "flat",
            "num_learners": learners,
            "every": 2,
            "conquer_from": None,
            "batches": "groups",
            "group_classes": 2,
            "hard_share": 0.6,
            "hard_from": 1,
        },
        schedule={"epochs": 2},
        checkpoint={"every_steps": 3},
    )
    kill = dnc("train", f"{name}.yaml", folder=place, before=partial(killed_when_writing, "files.json", "step-00000015"))
    assert kill.code == -signal.SIGKILL
    ended = dnc("train", f"{name}.yaml", folder=place, before=without_a_pass).result
    whole = dnc("train", f"{name}.yaml", "--set", f"run.name={name}-again", folder=place, before=without_report).result
    assert ended | {"run": ""} == whole | {"run": ""}
    assert_same_run(place / "runs" / name, place / "runs" / f"{name}-again")
    (division,) = metrics(place / "runs" / name, "division")
    assert division["left_out"] == 0
    # 16 classes in twos; where a learner has an odd number of them, one stays alone.
    assert division["groups"] in ((8,) if learners == 1 else (8, 9))


@pytest.mark.slow
def test_two_processes_stopped_by_the_launcher(tmp_path_factory: pytest.TempPathFactory) -> None:
    """SIGTERM to the launcher; the same W&B run goes on."""
    place, _, undisturbed = glyphs_on_two_processes(tmp_path_factory)
    run = place / "runs" / "stopped"
    command = [sys.executable, "-m", "dnc_dist", "launch", "run.yaml", "--nproc", "2", "--set", "run.name=stopped"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    with subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        wait_until(lambda: last_step(run) >= 11 or launcher.poll() is not None)
        launcher.terminate()
        _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 75, err
    assert err.startswith("epoch 0: ") or "SIGTERM: the workers save and stop" in err
    assert err.count("stopped: ") == 1 and "Traceback" not in err

    done = dnc(*command[3:], folder=place)
    assert done.result | {"run": ""} == undisturbed.result | {"run": ""}
    assert_same_run(run, place / "runs" / "run")
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({folder.name.rsplit("-", 1)[1] for folder in folders}) == 1
    assert read_finished_run(run).kinds() == [(line["kind"], line["step"]) for line in metrics(run)]
