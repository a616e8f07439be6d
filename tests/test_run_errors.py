"""Wrong input of every kind ends with exit code 2 and one message that names the value and the cure; damaged images cost nothing more."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dnc_dist import cli
from dnc_dist.data.index import open_index
from dnc_dist.processes.launch.verdict import Failure, LaunchReport, verdict
from tests.run_fixtures import Done, dnc, draw_folder, make_dataset, metrics, without_report, write_config


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, another one of other classes, the configuration of a short run, and that run."""
    folder = tmp_path_factory.mktemp("errors")
    root = make_dataset(folder)
    make_dataset(folder / "other", classes=12, seed=6)
    write_config(
        folder,
        root,
        division={"num_learners": 1, "conquer_from": None},
        schedule={"epochs": 1, "epoch_length": "dataset"},
        checkpoint={"keep": 1},
    )
    done = dnc("train", "run.yaml", folder=folder, before=without_report)
    assert done.code == 0, done
    return folder


def change(*pairs: str) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


@pytest.mark.parametrize("command", ["train", "launch", "config"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["division.num_learner=2"], "division.num_learner: unknown key; did you mean 'division.num_learners'?"),
        (["optin.lr=1"], "optin: unknown key; did you mean 'optim'?"),
        (["schedule.epochs=many"], "schedule.epochs: Input should be a valid integer, unable to parse string as an integer (got 'many')"),
        (["optim.lr=-0.1"], "optim.lr: Input should be greater than 0 (got -0.1)"),
        (["optim.lr=.nan"], "optim.lr: Input should be a finite number (got nan)"),
        (["division.num_learners=3"], "division.num_learners=3 must be a power of two when division.mode=hierarchical; use 2, 4, 8 ..."),
        (
            ["division.num_learners=4", "division.conquer_from=1", "schedule.epochs=9"],
            "division.conquer_from=1 comes before all 4 learners exist (with division.every=1 that is epoch 2); use 3 or more",
        ),
        (["schedule.batch_size=18"], "schedule.batch_size=18 is not divisible by schedule.samples_per_class=4"),
        (["data=3"], "data: Input should be a valid dictionary"),
        (["optim.lr=-1", "schedule.epochs=0", "model.dept=3"], "3 problem(s)"),
        (["evaluation.recall_at=[1, 100000000000]"], "evaluation.recall_at.1: Input should be less than or equal to 10000"),
        (["data.image_size=8"], "data.image_size=8 is too small for model.backbone=conv4, which halves it four times; use at least 16"),
        (["data.image_size=1000000"], "data.image_size: Input should be less than or equal to 4096"),
        (["optim.betas=[0.9, 1]"], "optim.betas.1: Input should be less than 1"),
        (["optim.betas=[-0.1, 0.9]"], "optim.betas.0: Input should be greater than or equal to 0"),
        (["data.std=[0.2, 0, 0.2]"], "data.std.1: Input should be greater than 0"),
    ],
)
def test_wrong_values_are_named_before_anything_starts(
    command: str, changes: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([command, str(place / "run.yaml"), *change(*changes)]) == 2
    out, err = capsys.readouterr()
    assert Done(2, out, err).error.startswith(f"{place / 'run.yaml'}: ") and message in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such configuration file"),
        ("a: [", "cannot be read as YAML"),
        ("- a\n- b\n", "expected sections"),
        ("model: {backbone: conv4}\n", "data.root: missing; set it in the file or with --set data.root=VALUE"),
        ("data: {root: x}\n3: {}\n", "3: unknown key"),
    ],
)
def test_wrong_configuration_files(text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.yaml"
    if text is not None:
        path.write_text(text)
    assert cli.run(["train", str(path)]) == 2
    out, err = capsys.readouterr()
    assert message in Done(2, out, err).error


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({}, "holds no image"),
        ({"a": 3}, "one training class (a)"),
        ({"a": 1, "b": 1, "c": 1}, "one image in each of its 3 training classes"),
    ],
)
def test_folders_that_nothing_can_be_learned_from(
    train: dict[str, int], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = draw_folder(tmp_path / "pictures", train, {"t": 2} if train else {})
    source.mkdir(exist_ok=True)
    assert cli.run(["data", "prepare", "folder", "--root", str(source), "--out", str(tmp_path / "data")]) == 2
    err = capsys.readouterr().err
    assert message in Done(2, "", err).error
    assert not (tmp_path / "data").exists() and os.listdir(tmp_path) == ["pictures"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.root=nowhere"], "nowhere holds no prepared data set (manifest.json is missing)"),
        (["division.num_learners=16", "schedule.epochs=9"], "division.num_learners=16"),
        (["evaluation.select_on=validation"], "evaluation.select_on=validation, but"),
        (
            ["data.validation_classes=0.99"],
            "data.validation_classes=0.99 of 16 training classes leaves 15 for validation and 1 for training",
        ),
        (["model.backbone=resnet5"], "model.backbone=resnet5"),
        (["model.weights=nowhere.pth"], "model.weights=nowhere.pth"),
        (["model.weights=text.pth"], "model.weights=text.pth"),
        (["model.weights=other.pth"], "model.weights=other.pth"),
        (["run.dir=text.pth"], "text.pth/fresh cannot be written (Not a directory); set run.dir to a folder"),
        (["run.dir=/proc/nothing"], "/proc/nothing/fresh cannot be written (No such file or directory); set run.dir to a folder"),
        (["run.name=foreign"], "runs/foreign exists and is no run directory (it has no config.yaml); set run.dir or run.name"),
    ],
)
def test_what_only_a_start_can_find(changes: list[str], message: str, place: Path) -> None:
    (place / "text.pth").write_text("no weights")
    torch.save({"stem.weight": torch.zeros(3)}, place / "other.pth")
    (place / "runs" / "foreign").mkdir(exist_ok=True)
    (place / "runs" / "foreign" / "thesis.tex").touch()
    error = dnc("train", "run.yaml", *change("run.name=fresh", *changes), folder=place).error
    assert message in error and "\n" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (change("division.mask_penalty=0.5"), "runs/run holds a run with other values of division.mask_penalty (0.01 -> 0.5); undo"),
        (change("model.embedding_dim=32", "run.seed=1"), "model.embedding_dim (16 -> 32), run.seed (0 -> 1)"),
        (change("engine.zero=0"), "engine.zero (1 -> 0)"),
        (change("schedule.epoch_length=over"), "schedule.epoch_length (dataset -> over)"),
        (change("data.root=other/data"), "data.root=other/data holds other images or labels than the run in runs/run began with"),
        (["--resume", "never"], "runs/run already holds a run; use --resume auto to go on with it, or set run.name to start another"),
        (["--resume", "nowhere"], "--resume nowhere is no checkpoint of runs/run"),
        (["--resume", "runs/run/checkpoints"], "--resume runs/run/checkpoints is no checkpoint of runs/run"),
        (["--resume", "runs/run/checkpoints/step-00000099"], "has no checkpoint step-00000099; it has step-00000008"),
    ],
)
def test_what_a_run_cannot_go_on_with(arguments: list[str], message: str, place: Path) -> None:
    run = place / "runs" / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "log.txt"}
    error = dnc("train", "run.yaml", *arguments, folder=place).error
    assert message in error and "\n" not in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "log.txt"} == before


def test_a_dry_run_looks_at_the_run_that_is_there(place: Path) -> None:
    changed = dnc("launch", "run.yaml", "--dry-run", "--nproc", "1", *change("division.mask_penalty=0.5"), folder=place)
    assert "runs/run holds a run with other values of division.mask_penalty (0.01 -> 0.5)" in changed.error
    done = dnc("launch", "run.yaml", "--dry-run", "--nproc", "1", folder=place)
    assert done.code == 0 and re.match(r"runs/run holds this run up to step-\d{8}, where it goes on if epochs are left; ", done.out)


def test_a_run_that_has_ended_says_so(place: Path) -> None:
    done = dnc("train", "run.yaml", folder=place, before=without_report)
    assert done.code == 0 and re.search(
        r"^this run has ended, after \d+ epoch\(s\); a larger schedule.epochs goes on with it$", done.out, re.M
    )


def with_few_files() -> None:
    """For ``before``: no more files may be open than so many, as after ``ulimit -n``; loader processes need more."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))


def test_too_few_open_files(place: Path) -> None:
    done = dnc("train", "run.yaml", *change("run.name=files", "data.workers=2"), folder=place, before=with_few_files)
    assert done.code == 2 and "Traceback" not in done.err
    last = done.err.splitlines()[-1]
    assert last.startswith("error: data.workers=2 cannot go on: Too many open files; ") and "`ulimit -n` is 32; raise the limit" in last


def test_a_local_copy_holds_the_same_data(place: Path) -> None:
    arguments = ["train", "run.yaml", *change("run.name=fresh")]
    error = dnc(*arguments, folder=place, env={"DNC_LOCAL_DATA": "other/data"}).error
    assert f"DNC_LOCAL_DATA=other/data holds another dataset than data.root={place / 'data'}" in error


def test_a_run_that_another_process_trains_is_left_alone(place: Path) -> None:
    (place / "runs" / "busy").mkdir()
    holding = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holding, str(place / "runs" / "busy" / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    error = dnc("train", "run.yaml", *change("run.name=busy"), folder=place).error
    other.communicate("")
    assert "another process is training in runs/busy" in error and "\n" not in error


def test_a_truncated_shard_is_named(place: Path) -> None:
    root = place / "truncated"
    shutil.copytree(place / "data", root)
    shard = sorted(root.glob("train-*.tar"))[3]
    os.truncate(shard, shard.stat().st_size - 700)
    done = subprocess.run(
        [sys.executable, "-m", "dnc_dist", "launch", "run.yaml", "--nproc", "2", *change("data.root=truncated", "run.name=short")],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    error = Done(done.returncode, done.stdout, done.stderr).error
    assert f"{shard} has" in error and "truncated" in error and error.count("\n") == 0
    assert done.stdout == "" and not (place / "runs" / "short").exists()
    shard.unlink()
    assert f"{shard} is missing" in dnc("train", "run.yaml", *change("data.root=truncated"), folder=place).error


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_counted_and_named_and_cost_no_more(workers: int, place: Path) -> None:
    root = place / f"damaged-{workers}"
    shutil.copytree(place / "data", root)
    index = open_index(root)
    rows = [int(index.view("train").rows[5]), int(index.view("test").rows[2])]
    for row in rows:
        with index.shard_paths[index.columns["shard"][row]].open("r+b") as file:
            file.seek(int(index.columns["offset"][row]))
            file.write(b"\0" * 200)
    changes = change(
        f"data.root={root.name}", f"run.name={root.name}", f"data.workers={workers}", "schedule.epochs=2", "division.num_learners=2"
    )
    done = dnc("train", "run.yaml", *changes, folder=place, before=without_report)
    assert done.result["recall@1"] > 0
    run = place / "runs" / root.name
    assert [line["undecodable_images"] for line in metrics(run, "epoch")] == [2, 2]
    assert metrics(run, "evaluation")[-1]["num_queries"] == 47
    log = (run / "log.txt").read_text()
    assert all(index.key(row) in log for row in rows) and "2 image(s) cannot be decoded" in log
    evaluated = dnc("evaluate", run, folder=place)
    assert evaluated.code == 0 and f"1 image(s) cannot be decoded and take part in nothing: {index.key(rows[1])}" in evaluated.err
    with np.load(run / "divisions" / "epoch-0001.npz") as division:
        assert division["learner_of"][5] == -1


def test_commands_on_what_is_no_run(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "runs" / "empty").mkdir()
    for command in ("evaluate", "report"):
        for run in ("runs/nothing", "runs/empty", "data"):
            error = dnc(command, run, folder=place).error
            assert run in error and "\n" not in error
    # A run that died before its first checkpoint, one whose disk was damaged, and one whose config.yaml was edited.
    for name in ("young", "rotten", "edited"):
        shutil.copytree(place / "runs" / "run", place / "runs" / name)
    shutil.rmtree(place / "runs" / "young" / "checkpoints")
    assert "runs/young has no checkpoint; train it" in dnc("evaluate", "runs/young", folder=place).error
    model = place / "runs" / "rotten" / "checkpoints" / "step-00000008" / "mp_rank_00_model_states.pt"
    model.write_bytes(bytes(model.stat().st_size))
    for arguments in (["evaluate", "runs/rotten"], ["train", "run.yaml", *change("run.name=rotten")]):
        error = dnc(*arguments, folder=place).error
        assert "step-00000008 is damaged (mp_rank_00_model_states.pt holds other bytes than were written); not used" in error
        assert "no usable checkpoint; remove the folder to start over" in error
    (place / "runs" / "edited" / "config.yaml").write_text("a: [")
    for arguments in (["evaluate", "runs/edited"], ["report", "runs/edited"], ["train", "run.yaml", *change("run.name=edited")]):
        assert "runs/edited/config.yaml" in dnc(*arguments, folder=place).error


def test_an_error_in_a_loader_process_is_shown_once() -> None:
    inner = "Caught FileNotFoundError in DataLoader worker process 0.\nOriginal Traceback\nFileNotFoundError: No such file: 'a.tar'\n"
    record = Failure(1.0, 1, "FileNotFoundError", inner, f"Traceback\nFileNotFoundError: {inner}")
    code, message = verdict(LaunchReport({0: 1, 1: None}, {0: record}))
    assert code == 1 and message.count("Original Traceback") == 1
    assert message.splitlines()[-1] == "rank 0 failed: FileNotFoundError: No such file: 'a.tar'"


def test_a_report_that_cannot_be_written_does_not_cost_the_result(place: Path) -> None:
    (place / "runs" / "run" / "report.html").mkdir()
    done = dnc("train", "run.yaml", folder=place)
    assert done.code == 1 and done.out.splitlines()[-1].startswith("RESULT {")
