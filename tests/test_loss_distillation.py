"""Learners as teachers: the divergence of similarities, alone and in a conquering step; a resumed run teaches as an undisturbed one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dnc_dist.base.rng import uniform
from dnc_dist.config import RunConfig
from dnc_dist.data.loading import Batch
from dnc_dist.doctor.harness import in_double, shake
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.objective import DncObjective
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_objective
from dnc_dist.engine.trainer import Trainer
from dnc_dist.engine.zero import read_model
from dnc_dist.loss.distillation import similarity_divergence
from dnc_dist.processes.signals import StopRequest
from dnc_dist.rundir import METRICS_FILE
from dnc_dist.rundir.tracker import read_metrics
from tests.engine_fixtures import config, division_by_hand, make_dataset
from tests.rounding import EXACT
from tests.spawn import spawn

LEARNERS, STEP = 4, 5
# Four learners from epoch 2 on, the whole embedding from epoch 3 on.
TAUGHT: dict[str, dict[str, Any]] = {
    "division": {"num_learners": LEARNERS, "every": 1, "conquer_from": 3, "distill": 50.0, "distill_temperature": 0.5},
    "schedule": {"epochs": 4},
}


def unit_rows(rows: int, width: int, seed: int) -> Tensor:
    return normalize(torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1)


def by_hand(z: Tensor, target: Tensor, learner: list[int], temperature: float) -> Tensor:
    """Row by row, as the formula is written."""
    values = []
    for i, own in enumerate(learner):
        others = [j for j, other in enumerate(learner) if j != i and other == own >= 0]
        if others:
            wanted, found = ((rows[others] @ rows[i] / temperature).softmax(0) for rows in (target, z))
            values.append((wanted * (wanted / found).log()).sum())
    return temperature**2 * torch.stack(values).mean()


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_the_divergence_and_its_gradient_are_those_of_the_formula(temperature: float) -> None:
    # Rows of no learner, and one that is alone with its learner.
    learner = [0, 0, -1, 1, 1, 1, 2, -1, 0, 1]
    z, target = unit_rows(10, 8, 0).requires_grad_(), unit_rows(10, 3, 1).requires_grad_()
    found = similarity_divergence(z, target, torch.tensor(learner), temperature)
    expected = by_hand(z, target.detach(), learner, temperature)
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=0)
    gradients = [torch.autograd.grad(value, z, retain_graph=True)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=EXACT, atol=EXACT)
    assert not gradients[0][[2, 6, 7]].any() and gradients[0][[0, 1, 3, 4, 5, 8, 9]].any(1).all()
    assert torch.autograd.grad(found, target, allow_unused=True) == (None,)


@pytest.mark.parametrize("learner", [[-1, -1, -1], [0, 1, 2], [0, -1, 1]])
def test_rows_without_others_teach_nothing(learner: list[int]) -> None:
    z = unit_rows(3, 4, 0).requires_grad_()
    value = similarity_divergence(z, unit_rows(3, 4, 1), torch.tensor(learner), 0.1)
    value.backward()
    assert value == 0 and z.grad is not None and not z.grad.any()


def test_what_agrees_costs_nothing_and_the_temperature_hardly_changes_the_size() -> None:
    z, learner = unit_rows(12, 6, 0), torch.zeros(12, dtype=torch.int64)
    assert similarity_divergence(z, z, learner, 0.1).abs() < EXACT
    # Far above the differences of cosines, T² KL is half the variance of the difference: to 1/T, by the next term of the series.
    target = unit_rows(12, 6, 1)
    others = ~torch.eye(12, dtype=torch.bool)
    difference = (target @ target.T - z @ z.T)[others].view(12, 11)
    half_variance = difference.var(1, correction=0).mean() / 2
    for temperature in (1e3, 1e4):
        value = similarity_divergence(z, target, learner, temperature)
        assert value == pytest.approx(half_variance.item(), rel=10 / temperature)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("distillation"))


def prepare(root: Path, **changes: dict[str, Any]) -> tuple[RunConfig, DncObjective, Batch]:
    cfg = config(root, root / "run", **(TAUGHT | changes))
    data = RunData(cfg)
    objective = build_objective(cfg, data.train.num_classes).train()
    in_double(shake(objective, LEARNERS, torch.Generator().manual_seed(11)))
    schedule = data.schedule(division_by_hand(data.train.labels, LEARNERS), 3, conquer=True)
    return cfg, objective, next(data.train_batches(schedule, first_step=STEP, skip=1))


@pytest.mark.parametrize(
    ("kind", "loss", "teacher"),
    [("learned", {}, "present"), ("fixed", {"name": "proxy_anchor"}, "present"), ("sliced", {}, "present"), ("learned", {}, "frozen")],
)
def test_a_conquering_step_learns_the_similarities_of_its_learner(root: Path, kind: str, loss: dict[str, Any], teacher: str) -> None:
    flat = TAUGHT["division"] | {"mode": "flat", "distill_teacher": teacher}
    cfg, objective, batch = prepare(root, model={"masks": kind}, division=flat, loss=loss, data={"augment": "color"})
    phase = Phase(STEP, LEARNERS, conquer=True, backbone_frozen=False)
    total, stats = objective(batch, phase)
    objective.distill = 0.0
    plain, without = objective(batch, phase)
    assert "distillation" not in without and stats.keys() - without.keys() == {"distillation"}

    (learner,) = batch.learner.unique().tolist()
    raw = objective.embed(batch, phase)
    then = raw
    if objective.teacher is not None:
        uniforms = uniform((objective.seed, "augment", STEP), batch.slots, objective.augment.num_uniforms)
        then = objective.teacher.head(objective.teacher.backbone(objective.augment(batch.images, uniforms)))
        assert not objective.teacher.backbone.training and not torch.allclose(then, raw)
    target = normalize(then.detach() * objective.masks.level_masks(LEARNERS)[learner].relu().detach(), dim=1)
    divergence = by_hand(objective.masks.whole(raw), target, [0] * len(raw), cfg.division.distill_temperature)
    assert divergence > 1e-4
    torch.testing.assert_close(stats["distillation"], divergence.detach(), rtol=EXACT, atol=0)
    torch.testing.assert_close(total, plain + cfg.division.distill * divergence, rtol=EXACT, atol=0)
    assert stats["loss"] == without["loss"]
    # Were masks trained that are not, the divergence would still not be theirs to lower.
    weights = [objective.head.linear.weight, objective.masks.masks.requires_grad_()]
    found = torch.autograd.grad(total - plain, weights, allow_unused=True)
    expected = torch.autograd.grad(cfg.division.distill * divergence, weights, allow_unused=True)
    assert found[1] is None and found[0] is not None and expected[0] is not None
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=EXACT * float(expected[0].abs().max()) * cfg.division.distill)


def test_before_conquering_nothing_is_taught(root: Path) -> None:
    _, objective, batch = prepare(root)
    assert "distillation" not in objective(batch, Phase(STEP, LEARNERS, conquer=False, backbone_frozen=False))[1]


def trained(root: Path, run: Path, teacher: str, resume: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Collective. The weights and the lines of a run whose masks part at splits; on several ranks with DeepSpeed's ZeRO 1."""
    changes = TAUGHT | {"model": {"masks": {"name": "learned", "split_scale": 0.25}}, "optim": {"lr": 1e-3, "mask_lr_mult": 1.0}}
    changes |= {"division": TAUGHT["division"] | {"distill_teacher": teacher}, "engine": {"zero": 1}}
    changes |= {"schedule": {"epochs": 4, "batch_size": 12}, "checkpoint": {"every_steps": 4, "keep": 50}, "evaluation": {"nmi": "never"}}
    cfg = config(root, run, **changes)
    trainer = Trainer(cfg, resume, StopRequest())
    trainer.fit()
    trainer.close()
    lines = [line for line in read_metrics(cfg.run.path / METRICS_FILE) if line["kind"] == "train"]
    return {key: value.clone() for key, value in trainer.objective.state_dict().items()}, lines


@pytest.mark.parametrize(
    ("world", "teacher"), [(1, "present"), (1, "frozen"), pytest.param(2, "present", marks=pytest.mark.slow), (2, "frozen")]
)
def test_a_run_that_is_resumed_while_it_is_taught_ends_as_an_undisturbed_one(root: Path, tmp_path: Path, world: int, teacher: str) -> None:
    """From the middle of a conquering epoch."""

    def train(name: str, resume: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        if world == 1:
            return trained(root, tmp_path / name, teacher, resume)
        ends = spawn(trained, world, root, tmp_path / name, teacher, resume)
        assert all(torch.equal(value, ends[1][0][key]) for key, value in ends[0][0].items())
        return ends[0]

    whole, lines = train("whole", "never")
    # Steps 19 to 24 conquer; every one of them is taught, none before.
    assert [line["step"] for line in lines if "distillation" in line] == list(range(19, 25))
    assert all(line["distillation"] > 0 for line in lines[18:])
    # The first step after the split of all coordinates into halves: the cosine of (1, 1/4) and (1/4, 1), which 6 steps of Adam on equal
    # masks, each of at most 0.001 a coordinate, change by no more than a per cent or two.
    assert lines[6]["mask_orthogonality"] == pytest.approx(8 / 17, rel=0.02)
    if teacher == "frozen":
        # What they taught is what was there when conquering began, though the network has gone on.
        before = read_model(tmp_path / "whole" / "checkpoints" / "step-00000018").weights
        assert {name for name in whole if name.startswith("teacher.")} == {
            f"teacher.{name}" for name in before if name.startswith(("backbone.", "head."))
        }
        for name in [name for name in whole if name.startswith("teacher.")]:
            assert torch.equal(whole[name], before[name.removeprefix("teacher.")])
        assert not torch.equal(whole["teacher.head.linear.weight"], whole["head.linear.weight"])
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    again, resumed = train("again", str(tmp_path / "again" / "checkpoints" / "step-00000020"))
    assert again.keys() == whole.keys() and all(torch.equal(value, whole[key]) for key, value in again.items())
    assert [(line["step"], line["loss"], line.get("distillation")) for line in resumed] == [
        (line["step"], line["loss"], line.get("distillation")) for line in lines
    ]
