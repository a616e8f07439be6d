"""``launch --dry-run`` says of a run what it then does, and leaves nothing; ``launch --repeat`` trains with several seeds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import Tensor

from dnc_dist.data.stream import Batch
from dnc_dist.engine import plan
from dnc_dist.engine.dry_run import dry_run, steps_at
from dnc_dist.engine.objective import DncObjective
from dnc_dist.engine.state import TrainState
from tests.engine_fixtures import config, make_dataset
from tests.run_fixtures import dnc, metrics, without_report, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dry")
    make_dataset(place)
    return place


def test_it_says_what_the_run_then_does(folder: Path) -> None:
    write_config(folder, Path("data"), evaluation={"every": 2}, division={"num_learners": 2, "every": 1, "conquer_from": 3})
    said = dnc("launch", "run.yaml", "--dry-run", "--nproc", "2", folder=folder)
    assert said.code == 0, said.err
    assert not (folder / "runs").exists()
    assert "72 training images of 12 classes" in said.out and "test: 18 images of 3 classes" in said.out
    assert "16 images a step over 2 process(es): 4 classes x 4, so 12 images of other classes for every anchor" in said.out
    table = said.out.split("\n\n")[1].splitlines()
    columns = [re.split("  +", line) for line in table[1:]]
    assert [line[:5] for line in columns] == [
        ["0", "1", "the whole set", "learns", "4 each"],
        ["1-2", "2", "clusters", "learns", "4 each"],
        ["3", "all, as one", "clusters", "learns", "4 each"],
    ]
    rates = [[float(rate) for rate in line[5].split(" to ")] for line in columns]
    assert rates[0][0] == 0.003 and rates[0][1] == rates[1][0] and rates[1][1] == rates[2][0]
    assert "a step of 8 images" in said.out
    assert re.search(r"16 steps of 16 images about \d+:\d\d; 3 division\(s\) and 2 evaluation\(s\)", said.out)
    assert dnc("train", "run.yaml", folder=folder, before=without_report).code == 0
    run = folder / "runs" / "run"
    assert [line["num_learners"] for line in metrics(run, "division")] == [1, 2, 2, 2]
    assert max(line["step"] for line in metrics(run, "train")) == 16
    assert [line["epoch"] for line in metrics(run, "evaluation")] == [2, 4]


def test_it_says_which_classes_share_a_batch(folder: Path) -> None:
    division = {"num_learners": 1, "batches": "neighbours", "skip_nearest": 2, "hard_share": 0.25, "hard_from": 2, "conquer_from": None}
    division["images_per_class"] = 1
    write_config(folder, Path("data"), "hard", division=division)
    said = dnc("launch", "hard.yaml", "--dry-run", folder=folder)
    assert said.code == 0, said.err
    assert (
        "batches of 4 classes: one with its 3 nearest behind the first 2; from epoch 2 on; 25% of all; the others of the whole training "
        "set; no image is left out but those without a second one of their class; classes are compared by the mean of 1 image(s) each\n"
    ) in said.out
    columns = [re.split("  +", line) for line in said.out.split("\n\n")[1].splitlines()[1:]]
    assert [line[:3] for line in columns] == [["0-1", "1", "the whole set"], ["2-3", "1", "neighbours 25%"]]
    assert "; 2 division(s) and" in said.out
    write_config(folder, Path("data"), "hardest", division=division | {"skip_nearest": 8})
    assert (
        "skip_nearest=8 passes over more, but the training set has only 12 with at least 2 images"
        in dnc("launch", "hardest.yaml", "--dry-run", folder=folder).error
    )


@pytest.mark.parametrize(
    ("masks", "division", "trained"),
    [
        ("sliced", {"conquer_from": None}, {(2, False)}),
        ("learned", {"conquer_from": None}, {(2, False)}),
        ("sliced", {"conquer_from": 0, "conquer_batches": "whole"}, {(1, True)}),
    ],
)
def test_it_measures_the_steps_that_the_first_epoch_takes(
    masks: str, division: dict[str, object], trained: set[tuple[int, bool]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(folder / "data", folder / "runs" / "x", model={"masks": masks}, division={"mode": "flat", "num_learners": 2, **division})
    forward, phases = DncObjective.forward, list[plan.Phase]()

    def noted(self: DncObjective, batch: Batch, phase: plan.Phase) -> tuple[Tensor, dict[str, Tensor]]:
        phases.append(phase)
        return forward(self, batch, phase)

    monkeypatch.setattr(DncObjective, "forward", noted)
    assert dry_run(cfg, 1).endswith("nothing was written")
    assert {(phase.level, phase.conquer) for phase in phases} == trained


def test_it_refuses_what_the_run_would_refuse(folder: Path) -> None:
    write_config(folder, Path("nowhere"), "lost")
    lost = dnc("launch", "lost.yaml", "--dry-run", folder=folder)
    assert lost.code == 2 and "data.root" in lost.err
    write_config(folder, Path("data"), "weightless", model={"weights": "missing.safetensors", "batch_norm": "frozen"})
    weightless = dnc("launch", "weightless.yaml", "--dry-run", folder=folder)
    assert weightless.code == 2 and "missing.safetensors" in weightless.err
    assert not list(folder.glob("runs/lost*")) and not list(folder.glob("runs/weightless*"))


@pytest.mark.parametrize(
    ("division", "learners", "frozen"),
    [
        ({"num_learners": 4, "every": 2, "conquer_from": 6}, [1, 1, 2, 2, 4, 4, 4, 4], [0, 2, 4, 6]),
        ({"num_learners": 4, "every": 2, "conquer_from": 6, "conquer_batches": "whole"}, [1, 1, 2, 2, 4, 4, 1, 1], [0, 2, 4]),
        ({"num_learners": 4, "every": 2, "mode": "flat", "conquer_from": None}, [4] * 8, [0, 2, 4, 6]),
        ({"num_learners": 1, "every": 2, "conquer_from": None}, [1] * 8, [0]),
    ],
)
def test_learners_and_waiting_backbones(division: dict[str, object], learners: list[int], frozen: list[int], tmp_path: Path) -> None:
    cfg = config(tmp_path, tmp_path / "run", division={"backbone_frozen_epochs": 1, **division}, schedule={"epochs": 8})
    assert [plan.learners_at(cfg, epoch) for epoch in range(8)] == learners
    assert [epoch for epoch in range(8) if plan.backbone_frozen(cfg, epoch)] == frozen
    assert plan.division_due(cfg, TrainState())
    assert steps_at(cfg, 0, 10 * cfg.schedule.batch_size + 1) == 10


@pytest.mark.slow
def test_repeated_runs_differ_in_their_seed_and_are_compared(folder: Path) -> None:
    write_config(folder, Path("data"), "again", schedule={"epochs": 2}, division={"conquer_from": None}, run={"seed": 3, "dir": "repeated"})
    done = dnc("launch", "again.yaml", "--nproc", "1", "--repeat", "2", folder=folder)
    assert done.code == 0, done.err
    runs = [folder / "repeated" / f"again-seed{seed}" for seed in (3, 4)]
    assert sorted((folder / "repeated").iterdir()) == runs
    losses = [[line["loss"] for line in metrics(run, "train")] for run in runs]
    assert losses[0] != losses[1]
    assert "#1  seeds 3, 4" in done.out and "±" in done.out
    # Complete runs are not trained again.
    before = [(run / "metrics.jsonl").read_bytes() for run in runs]
    assert dnc("launch", "again.yaml", "--nproc", "1", "--repeat", "2", folder=folder).code == 0
    assert [(run / "metrics.jsonl").read_bytes() for run in runs] == before
