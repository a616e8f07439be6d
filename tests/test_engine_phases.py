"""Divisions, frozen epochs and conquer over a real training on 2 processes; the functions of the plan; no compiler is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from dnc_dist.clustering.division import Division
from dnc_dist.config import RunConfig, dump_config
from dnc_dist.doctor.harness import smooth
from dnc_dist.engine import plan
from dnc_dist.engine.optimizer import WaitingAdamW
from dnc_dist.engine.state import TrainState
from dnc_dist.engine.trainer import Trainer
from dnc_dist.processes.signals import StopRequest
from dnc_dist.rundir import METRICS_FILE
from dnc_dist.rundir.tracker import read_metrics
from tests.engine_fixtures import config, make_dataset
from tests.rounding import move_weights, share_of_course
from tests.spawn import spawn

# 6 steps an epoch. Divisions in epochs 0, 3 and 6 into 1, 2 and 4 learners, each followed by a frozen epoch; conquer in epoch 8.
EVERY, EPOCHS, CONQUER = 3, 9, 8
CHANGES: dict[str, dict[str, Any]] = {
    "division": {"every": EVERY, "backbone_frozen_epochs": 1, "conquer_from": CONQUER, "conquer_batches": "clustered"},
    "schedule": {"epochs": EPOCHS, "batch_size": 12},
    "optim": {"lr": 3e-4, "mask_lr_mult": 10},
    "loss": {"learn_beta": "scalar"},
    "data": {"augment": "light"},
    "evaluation": {"every": EPOCHS, "nmi": "never"},
}


class Step(NamedTuple):
    """After a step: where it was, the mean size of the backbone's update, sums of the moments of its Adam, the masks."""

    epoch: int
    level: int
    update: float
    moments: list[float]
    masks: Tensor


class Course(NamedTuple):
    """A whole training."""

    steps: list[Step]
    losses: list[float]
    parameters: Tensor


def _moments(engine: Any) -> list[float]:
    """This rank's part of the backbone's Adam state."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = [optimizer.state[value] for group in optimizer.param_groups if group["name"] == "backbone" for value in group["params"]]
    return [sum(float(state[name].double().sum()) for state in states) for name in ("step", "exp_avg", "exp_avg_sq")]


def _train(root: str, run: str, zero: int, *, neighbour: bool = False) -> Course:
    cfg = config(Path(root), Path(run), **CHANGES, engine={"zero": zero})
    trainer = Trainer(cfg, "never", StopRequest())
    smooth(trainer.objective.backbone)
    if neighbour:
        move_weights(trainer.objective)
    backbone, steps, update = trainer.objective.backbone, [], trainer.engine.step

    def step() -> None:
        before = parameters_to_vector(backbone.parameters()).detach().clone()
        update()
        change = (parameters_to_vector(backbone.parameters()).detach() - before).abs().mean()
        assert trainer.state.division is not None
        level = trainer.state.division.num_learners
        steps.append(
            Step(trainer.state.epoch, level, change.item(), _moments(trainer.engine), trainer.objective.masks.masks.detach().clone())
        )

    trainer.engine.step = step
    trainer.fit()
    trainer.close()
    losses = [line["loss"] for line in read_metrics(Path(run) / METRICS_FILE) if line["kind"] == "train"]
    return Course(steps, losses, parameters_to_vector(trainer.objective.parameters()).detach().clone())


def _courses(root: str, place: str) -> dict[str, Course]:
    found = {f"ZeRO {zero}": _train(root, f"{place}/zero{zero}", zero) for zero in (0, 1, 2)}
    return found | {"neighbour": _train(root, f"{place}/neighbour", 0, neighbour=True)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("phases"))


@pytest.fixture(scope="module")
def courses(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Course]]:
    """Of each of two ranks, and beside them that of a neighbour (see ``rounding.py``)."""
    return spawn(_courses, 2, str(root), str(tmp_path_factory.mktemp("runs")))


def update_size(course: Course, epoch: int) -> float:
    return float(np.mean([step.update for step in course.steps if step.epoch == epoch]))


ZERO = ["ZeRO 0", "ZeRO 1", "ZeRO 2"]


@pytest.mark.parametrize("name", ZERO)
def test_levels_and_frozen_epochs(courses: list[dict[str, Course]], name: str) -> None:
    course = courses[0][name]
    assert len(course.steps) == len(course.losses) == 6 * EPOCHS
    assert [step.level for step in course.steps[::6]] == [1, 1, 1, 2, 2, 2, 4, 4, 4]
    moved = [update_size(course, epoch) > 0 for epoch in range(EPOCHS)]
    assert moved == [epoch % EVERY != 0 for epoch in range(EPOCHS)]
    assert all(step.update == 0 for step in course.steps if step.epoch % EVERY == 0)


@pytest.mark.parametrize("name", ZERO)
def test_updates_after_a_frozen_epoch_are_as_large_as_before(courses: list[dict[str, Course]], name: str) -> None:
    for frozen in (3, 6):
        ratio = update_size(courses[0][name], frozen + 1) / update_size(courses[0][name], frozen - 1)
        assert 1 / 1.5 < ratio < 1.5


@pytest.mark.parametrize("name", ZERO)
def test_optimizer_state_waits_in_a_frozen_epoch(courses: list[dict[str, Course]], name: str) -> None:
    for rank in courses:
        moments = [step.moments for step in rank[name].steps]
        assert moments[0] == moments[5] == [0.0, 0.0, 0.0]
        for frozen in (3, 6):
            assert all(later == moments[6 * frozen - 1] for later in moments[6 * frozen : 6 * frozen + 6])
            assert moments[6 * frozen + 6] != moments[6 * frozen + 5] != moments[6 * frozen - 2]


@pytest.mark.parametrize("name", ZERO[1:])
def test_same_curve_at_every_zero_stage(courses: list[dict[str, Course]], name: str) -> None:
    found, expected = courses[0][name].losses, courses[0]["ZeRO 0"].losses
    neighbour = courses[0]["neighbour"].losses
    assert share_of_course(found, expected, neighbour) < 1
    # Which is close: a step that goes wrong changes the losses by a per cent and more.
    assert share_of_course([1.001 * loss for loss in expected], expected, neighbour) > 1


@pytest.mark.parametrize("name", ZERO)
def test_ranks_keep_equal_parameters(courses: list[dict[str, Course]], name: str) -> None:
    assert torch.equal(courses[0][name].parameters, courses[1][name].parameters)


@pytest.mark.parametrize("name", ZERO)
def test_leaves_of_a_mask_are_equal_until_they_split(courses: list[dict[str, Course]], name: str) -> None:
    course = courses[0][name]
    for step in course.steps:
        leaves = step.masks.view(step.level, 4 // step.level, -1)
        assert torch.equal(leaves, leaves[:, :1].expand_as(leaves))
    last = course.steps[-1].masks
    assert len(last.unique(dim=0)) == 4
    masks = [step.masks for step in course.steps]
    # The masks move in frozen epochs, too, and rest when conquering.
    assert not torch.equal(masks[6 * 6], masks[6 * 7 - 1])
    assert all(torch.equal(masks[6 * CONQUER - 1], later) for later in masks[6 * CONQUER :])


def plan_config(tmp_path: Path, **changes: dict[str, Any]) -> RunConfig:
    return config(tmp_path, tmp_path / "run", **changes)


def state_after(division_epoch: int | None, epoch: int, level: int = 1) -> TrainState:
    made = (
        None
        if division_epoch is None
        else Division(np.zeros(4, np.int16), level, np.empty((level, 0), np.float32), division_epoch, np.zeros(level), 0)
    )
    return TrainState(epoch=epoch, division=made)


def test_division_is_due_once_a_period(tmp_path: Path) -> None:
    cfg = plan_config(tmp_path, division={"every": 2, "conquer_from": 6}, schedule={"epochs": 10})
    assert plan.division_due(cfg, state_after(None, 0))
    made: int | None = None
    due = []
    for epoch in range(10):
        if plan.division_due(cfg, state_after(made, epoch)):
            due.append(epoch)
            made = epoch
        # Asked again, as after a resume, it is done.
        assert not plan.division_due(cfg, state_after(made, epoch))
    assert due == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("conquer", [5, 6])
def test_conquer_on_the_whole_set_divides_once_more_and_without_features(tmp_path: Path, conquer: int) -> None:
    cfg = plan_config(
        tmp_path,
        division={"every": 2, "conquer_from": conquer, "conquer_batches": "whole", "backbone_frozen_epochs": 1},
        schedule={"epochs": 10},
    )
    made: int | None = None
    due = []
    for epoch in range(10):
        state = state_after(made, epoch, 4)
        if plan.division_due(cfg, state):
            due.append((epoch, plan.division_needs_features(cfg, state)))
            made = epoch
    assert due == [(0, False), (2, True), (4, True), (conquer, False)]
    # Nothing is divided afterwards, so nothing is frozen.
    assert [epoch for epoch in range(10) if plan.backbone_frozen(cfg, epoch)] == [0, 2, 4]


def test_who_needs_features(tmp_path: Path) -> None:
    hierarchical = plan_config(tmp_path)
    flat = plan_config(tmp_path, division={"mode": "flat"})
    alone = plan_config(tmp_path, division={"num_learners": 1})
    first, later = state_after(None, 0), state_after(0, 1)
    assert [plan.division_needs_features(cfg, first) for cfg in (hierarchical, flat, alone)] == [False, True, False]
    assert [plan.division_needs_features(cfg, later) for cfg in (hierarchical, flat, alone)] == [True, True, False]


def test_groups_need_features_as_soon_as_batches_are_made_of_them(tmp_path: Path) -> None:
    def passes(**division: Any) -> list[int]:
        cfg = plan_config(tmp_path, division={"num_learners": 1, "every": 2, **division}, schedule={"epochs": 8})
        return [epoch for epoch in range(0, 8, 2) if plan.division_needs_features(cfg, state_after(epoch - 2 if epoch else None, epoch))]

    assert passes() == []
    assert passes(batches="groups") == [0, 2, 4, 6]
    # A division lasts until the next one, so that of epoch 4 makes the groups of epoch 5.
    assert passes(batches="neighbours", hard_from=5) == [4, 6]
    assert passes(batches="groups", hard_share=0.0) == []
    assert passes(batches="groups", num_learners=2, hard_share=0.0) == [2, 4, 6]
    assert passes(batches="groups", conquer_from=4, conquer_batches="whole") == [0, 2]
    late = plan_config(tmp_path, division={"batches": "groups", "hard_share": 0.5, "hard_from": 1}, schedule={"epochs": 3})
    assert [plan.hard_share(late, epoch) for epoch in range(3)] == [0.0, 0.5, 0.5]


def test_phase_follows_the_state(tmp_path: Path) -> None:
    cfg = plan_config(
        tmp_path,
        division={"every": 3, "backbone_frozen_epochs": 2, "conquer_from": 8},
        schedule={"epochs": 10},
        optim={"lr": 0.1, "mask_lr_mult": 5, "loss_lr_mult": 0.5},
    )
    frozen, conquering = [], []
    for epoch in range(10):
        state = state_after(epoch, epoch, level=2)
        state.step = 17
        phase, rates = plan.phase(cfg, state), plan.learning_rates(cfg, state, 6)
        assert (phase.step, phase.level) == (17, 2)
        frozen.append(phase.backbone_frozen)
        conquering.append(phase.conquer)
        # What is not trained waits: its learning rate is exactly 0.
        assert (rates["backbone"] == 0) == phase.backbone_frozen
        assert (rates["masks"] == 0) == phase.conquer
        assert rates["embedding"] == pytest.approx(0.1) and rates["loss"] == pytest.approx(0.05)
        if not phase.conquer:
            assert rates["masks"] == pytest.approx(0.5)
    assert frozen == [True, True, False] * 3 + [True]
    assert conquering == [False] * 8 + [True] * 2


def test_learning_rate_warms_up_and_decays(tmp_path: Path) -> None:
    cfg = plan_config(tmp_path, schedule={"epochs": 10, "warmup": 2.0, "decay": "cosine", "final_lr_share": 0.1})
    shares = [plan.lr_share(cfg, progress) for progress in (0.0, 0.5, 1.0, 2.0, 6.0, 10.0, 11.0)]
    assert shares == pytest.approx([5e-4, 0.25, 0.5, 1.0, 0.55, 0.1, 0.1])
    assert shares[0] > 0  # a rate of 0 would make every group wait
    constant = plan_config(tmp_path, schedule={"epochs": 10, "warmup": 2.0})
    assert [plan.lr_share(constant, progress) for progress in (1.0, 2.0, 9.9)] == [0.5, 1.0, 1.0]
    halfway = TrainState(epoch=5, batches_done=3, division=state_after(5, 5).division)
    assert plan.learning_rates(cfg, halfway, 6)["embedding"] == pytest.approx(cfg.optim.lr * plan.lr_share(cfg, 5.5))


def test_evaluation_and_nmi_at_the_end_and_on_time(tmp_path: Path) -> None:
    cfg = plan_config(tmp_path, schedule={"epochs": 5}, evaluation={"every": 2, "nmi": "final"})
    assert [plan.evaluation_due(cfg, epoch) for epoch in range(5)] == [False, True, False, True, True]
    assert [plan.nmi_due(cfg, epoch) for epoch in range(5)] == [False] * 4 + [True]
    assert not plan.finished(cfg, TrainState(epoch=4)) and plan.finished(cfg, TrainState(epoch=5))


def test_waiting_adamw_equals_adamw_that_never_saw_the_frozen_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(9, 5, generator=generator)
    waiting, plain = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    one, other = WaitingAdamW([waiting], lr=0.1, weight_decay=0.1), torch.optim.AdamW([plain], lr=0.1, weight_decay=0.1)
    for number, grad in enumerate(grads):
        frozen = number in (0, 1, 4, 5, 6)
        one.param_groups[0]["lr"] = 0.0 if frozen else 0.1
        waiting.grad = torch.zeros(5) if frozen else grad
        one.step()
        if not frozen:
            plain.grad = grad
            other.step()
        assert torch.equal(waiting, plain)


def test_plain_adamw_would_make_the_updates_after_a_long_frozen_epoch_too_large() -> None:
    grads = torch.randn(400, 50, generator=torch.Generator().manual_seed(0))

    def ratio(kind: type[torch.optim.AdamW]) -> float:
        """Mean size of the 100 updates after 3,000 frozen steps relative to the 100 before."""
        parameter = torch.nn.Parameter(torch.zeros(50))
        optimizer = kind([parameter], lr=0.01, weight_decay=0.0)
        sizes = []
        for number in range(300 + 3000 + 100):
            frozen = 300 <= number < 3300
            optimizer.param_groups[0]["lr"] = 0.0 if frozen else 0.01
            parameter.grad = torch.zeros(50) if frozen else grads[number if number < 300 else number - 3000]
            before = parameter.detach().clone()
            optimizer.step()
            if not frozen:
                sizes.append(float((parameter.detach() - before).abs().mean()))
        return float(np.mean(sizes[300:]) / np.mean(sizes[200:300]))

    assert 1 / 1.5 < ratio(WaitingAdamW) < 1.5
    assert ratio(torch.optim.AdamW) > 2


@pytest.mark.slow
def test_training_needs_no_compiler(root: Path, tmp_path: Path) -> None:
    """Two processes through the real command, without a single program to be found and without caches."""
    cfg = config(root, tmp_path / "run", division={"num_learners": 1}, evaluation={"nmi": "never"})
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(cfg))
    (tmp_path / "home").mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "TORCH_EXTENSIONS_DIR", "CUDA_HOME")}
    environment |= {"PATH": "", "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    assert shutil.which("ninja", path="") is None
    command = [sys.executable, "-m", "dnc_dist", "launch", str(file), "--nproc", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert result["samples_seen"] == 72
