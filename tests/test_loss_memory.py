"""Cross-batch memory: what the ring holds, what it adds to a loss, and that ranks, resumes and divisions do not change that."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import dnc_kernels
from dnc_dist.base import parts
from dnc_dist.config import ConfigError
from dnc_dist.doctor.harness import in_double, relative_error, shake, smooth
from dnc_dist.engine import plan
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_objective
from dnc_dist.engine.state import TrainState
from dnc_dist.loss.base import StepRows
from dnc_dist.loss.margin import MarginLoss
from dnc_dist.loss.memory import Memory
from dnc_dist.loss.pairwise import PairMatrix, PairwiseLoss
from dnc_dist.processes import distributed
from tests.engine_fixtures import config, damage, division_by_hand, make_dataset
from tests.rounding import EXACT
from tests.spawn import spawn

DIM, CLASSES = 6, 5


def held(memory: Memory) -> list[tuple[tuple[float, ...], int, int]]:
    """The rows in a ring, oldest first."""
    places = [(int(memory.next) + place) % memory.size for place in range(memory.size)]
    return [
        (tuple(memory.z[place].tolist()), int(memory.labels[place]), int(memory.learner[place]))
        for place in places
        if memory.learner[place] >= 0
    ]


@pytest.mark.parametrize("size", [8, 13])
def test_a_ring_holds_the_newest_rows_that_take_part(size: int) -> None:
    numbers = torch.Generator().manual_seed(0)
    memory, expected = Memory(size, 2).double(), []
    for count in (3, 8, 1, 5, 8, 2, 8):
        z = torch.randn(count, 2, generator=numbers, dtype=torch.float64)
        labels, learner = torch.randint(9, (count,), generator=numbers), torch.randint(-1, 3, (count,), generator=numbers)
        memory.store(z, labels, learner)
        expected += [row for row in zip(map(tuple, z.tolist()), labels.tolist(), learner.tolist(), strict=True) if row[2] >= 0]
        assert held(memory) == expected[-size:]
    # The dummies of many ranks may be more than there are places.
    memory.store(torch.ones(30, 2), torch.ones(30).long(), torch.arange(30) // 29 - 1)
    assert held(memory) == [*expected, ((1.0, 1.0), 1, 0)][-size:]
    memory.clear()
    assert held(memory) == [] and all(
        torch.equal(value, other) for value, other in zip(memory.buffers(), Memory(size, 2).buffers(), strict=True)
    )


class CosineLoss(PairwiseLoss):
    """A loss of all pairs whose value is easily computed in another way: Σ (1 - cos) of positives + Σ cos² of negatives."""

    def anchor_values(self, pairs: PairMatrix) -> tuple[Tensor, Tensor]:
        value = torch.where(pairs.positive, 1 - pairs.cosine, 0).sum(1) + torch.where(pairs.negative, pairs.cosine.square(), 0).sum(1)
        return value, (pairs.positive | pairs.negative).sum(1)


def steps(count: int, rows: int = 12) -> list[StepRows]:
    """Steps of one rank with two learners; every image comes in several of them, and some cannot be decoded."""
    numbers = torch.Generator().manual_seed(1)
    found = []
    for step in range(count):
        row_ids = torch.randperm(20, generator=numbers)[:rows]
        learner = torch.where(torch.rand(rows, generator=numbers) < 0.2, -1, row_ids % CLASSES % 2)
        z = normalize(torch.randn(rows, DIM, generator=numbers, dtype=torch.float64)).requires_grad_()
        columns = {"labels": row_ids % CLASSES, "learner": learner, "row_ids": row_ids}
        found.append(StepRows(z, None, **columns, num_learners=2, seed=3, step=step, rows_of_ranks=[rows]))
    return found


def kept(past: list[StepRows], size: int) -> list[tuple[Tensor, int, int]]:
    """(z, label, learner) of the last rows of past steps, oldest first."""
    rows = [(rows.z[at].detach(), int(rows.labels[at]), int(rows.learner[at])) for rows in past for at in range(len(rows.z))]
    return [row for row in rows if row[2] >= 0][-size:]


def test_value_and_gradient_are_those_of_all_pairs_by_brute_force() -> None:
    """Pairs of the batch without a row and itself, and pairs of an anchor with every kept row of its learner, be it the same image."""
    loss = CosineLoss(CosineLoss.Options(memory=20, memory_from=1), num_classes=CLASSES, embedding_dim=DIM).double()
    done = steps(5)
    for number, rows in enumerate(done):
        value, _ = loss.of_step(rows)
        (gradient,) = torch.autograd.grad(value, rows.embeddings)
        terms: list[list[Tensor]] = [[], []]
        past = kept(done[1:number], 20)
        for i in range(len(rows.z)):
            a = int(rows.learner[i])
            batch = [(rows.z[j], int(rows.labels[j]), int(rows.learner[j])) for j in range(len(rows.z)) if j != i]
            for z, label, learner in batch + past if a >= 0 else []:
                if learner == a:
                    cosine = rows.z[i] @ z
                    terms[a].append(1 - cosine if label == rows.labels[i] else cosine.square())
        expected = torch.stack([torch.stack(each).mean() for each in terms]).mean()
        torch.testing.assert_close(value, expected, rtol=EXACT, atol=0)
        (by_hand,) = torch.autograd.grad(expected, rows.embeddings)
        torch.testing.assert_close(gradient, by_hand, rtol=0, atol=EXACT * float(by_hand.abs().max()))


def test_margin_loss_draws_from_batch_and_memory() -> None:
    """The kernels' own specification on the references laid one below the other, whatever they are called."""
    loss = MarginLoss(MarginLoss.Options(memory=24, nonzero_loss_cutoff=1.9), num_classes=CLASSES, embedding_dim=DIM).double()
    done = steps(5)
    drawn_from_memory = 0
    for number, rows in enumerate(done):
        value, stats = loss.of_step(rows)
        (gradient,) = torch.autograd.grad(value, rows.embeddings)
        past = kept(done[:number], 24)
        ref_z = torch.cat([rows.z, *[z[None] for z, _, _ in past]])
        labels = torch.cat([rows.labels, torch.tensor([label for _, label, _ in past], dtype=torch.int64)])
        learner = torch.cat([rows.learner, torch.tensor([learner for _, _, learner in past], dtype=torch.int64)])
        # By place in the ring, which overwrites in turn.
        first = sum(len(kept([rows], 99)) for rows in done[:number]) - len(past)
        row_ids = torch.cat([rows.row_ids, -2 - (first + torch.arange(len(past))) % 24])
        anchors = dnc_kernels.Rows(rows.z, rows.labels, rows.learner, rows.row_ids)
        others = dnc_kernels.Rows(ref_z, labels, learner, row_ids)
        sampling = dnc_kernels.Sampling(nonzero_loss_cutoff=1.9, seed=rows.seed, step=rows.step)
        pairs = dnc_kernels.sample_pairs(anchors, others, sampling=sampling)
        drawn_from_memory += int((pairs.other >= len(rows.z)).sum())
        out = dnc_kernels.margin_loss_on_pairs(anchors, pairs, ref_z, beta=loss.beta, num_learners=2)
        present = torch.tensor([bool((rows.learner == a).any()) for a in range(2)])
        expected = (out.learner_loss_sum / out.learner_num_active.clamp(min=1)).sum() / present.sum()
        torch.testing.assert_close(value, expected, rtol=EXACT, atol=0)
        assert int(stats["active_pairs"]) == int(out.num_active)
        (by_hand,) = torch.autograd.grad(expected, rows.embeddings)
        torch.testing.assert_close(gradient, by_hand, rtol=0, atol=EXACT * float(by_hand.abs().max()))
    assert drawn_from_memory > 100


def test_memory_begins_at_its_step_and_not_in_evaluation() -> None:
    plain = MarginLoss(MarginLoss.Options(), num_classes=CLASSES, embedding_dim=DIM).double()
    late = MarginLoss(MarginLoss.Options(memory=12, memory_from=3), num_classes=CLASSES, embedding_dim=DIM).double()
    assert not [name for name in plain.state_dict() if "memory" in name]
    for rows in steps(3):
        assert torch.equal(plain.of_step(rows)[0], late.of_step(rows)[0]) and not held(late.memory)
    late.eval()
    late.of_step(steps(4)[3])
    assert not held(late.memory)
    late.train()
    late.of_step(steps(4)[3])
    assert len(held(late.memory)) == len(kept([steps(4)[3]], 12))


class Case(NamedTuple):
    """Steps of the objective: what differs from the fixture's configuration; ``loss`` in place of the configured one."""

    changes: dict[str, dict[str, Any]]
    loss: type[PairwiseLoss] | None = None
    conquer: bool = False
    data: str = "whole"


STEPS = 4
MEMORY = {"memory": 40, "memory_from": 1}
TWO = {"learners_per_step": 2}
CASES = {
    "margin, one learner a step": Case({"loss": {**MEMORY, "learn_beta": "class"}}, data="damaged"),
    "margin, two learners a step": Case({"loss": MEMORY, "division": TWO}),
    "margin, conquer": Case({"loss": MEMORY}, conquer=True),
    "all pairs, one learner a step": Case({}, CosineLoss),
}
# What differs between losses of pairs is what they make of the matrix: all of it, its hardest pairs, or each anchor's positives in turn.
for name in ("supcon", "multi_similarity", "smooth_ap"):
    # 10 rows for each of two learners, or 5 on each of four ranks, of which some cannot be decoded.
    small = {"schedule": {"batch_size": 20, "samples_per_class": 5}, "division": TWO}
    CASES[name] = Case(small, parts.load("loss", name), data="damaged")


def _course(case: Case, root: Path, place: Path) -> dict[str, Tensor]:
    """Losses, gradients and the ring over a few steps, with weights that move by the gradient."""
    cfg = config(root, place / "run", **case.changes)
    data = RunData(cfg)
    objective = build_objective(cfg, data.train.num_classes).train()
    if case.loss is not None:
        objective.loss = case.loss(case.loss.Options(**MEMORY), num_classes=data.train.num_classes, embedding_dim=16)
    shake(objective, 4, torch.Generator().manual_seed(11))
    smooth(objective.backbone)
    in_double(objective)
    groups = distributed.rank_groups(cfg.division.learners_per_step)
    schedule = data.schedule(division_by_hand(data.train.labels, 4), 0, conquer=case.conquer)
    trained = {name: value for name, value in objective.named_parameters() if value.requires_grad}
    found: dict[str, Tensor] = {}
    batches = data.train_batches(schedule, first_step=0, skip=0, group=groups.get(schedule.turns.shape[1]))
    for step in range(STEPS):
        batch = next(batches, None)
        if batch is None:
            batches = data.train_batches(schedule, first_step=step, skip=0, group=groups.get(schedule.turns.shape[1]))
            batch = next(batches)
        loss, stats = objective(batch, Phase(step, 4, case.conquer, False))
        objective.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, value in trained.items():
                grad = torch.zeros_like(value) if value.grad is None else value.grad
                mean = distributed.all_reduce_sum(grad) / distributed.world_size()
                value.sub_(0.05 * mean)
                found[f"gradient {step} {name}"] = mean
        found[f"loss {step}"] = stats["loss"]
    ring = {name: value.clone() for name, value in objective.loss.memory.named_buffers()}
    for name, value in ring.items():
        others = distributed.gather_objects(value)
        assert all(torch.equal(value, other) for other in others), name
    return found | ring


def _courses(roots: dict[str, str], place: str) -> dict[str, float]:
    """On one process, write what it finds; on several, the largest error relative to that (rank 0 compares)."""
    errors = {}
    for number, (name, case) in enumerate(CASES.items()):
        found = _course(case, Path(roots[case.data]), Path(place))
        if distributed.world_size() == 1:
            torch.save(found, f"{place}/{number}.pt")
            continue
        expected = torch.load(f"{place}/{number}.pt")
        assert found.keys() == expected.keys()
        errors[name] = max(relative_error(found[key].double(), expected[key].double()) for key in found)
    return errors


def test_the_course_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "dataset")
    roots = {"whole": str(root), "damaged": str(damage(root, tmp_path / "damaged", train=list(range(0, 72, 5))))}
    spawn(_courses, 1, roots, str(tmp_path))
    for number, case in enumerate(CASES.values()):
        course = torch.load(f"{tmp_path}/{number}.pt")
        assert bool(course["learner"].unique().numel() > 1) != case.conquer
        # The first step that meets kept rows is the third. Some losses have steps without a pair that counts.
        assert any(course[f"loss {step}"] > 0 for step in range(2, STEPS)) and int((course["learner"] >= 0).sum()) > 30
    for world in (2, 4):
        errors = spawn(_courses, world, roots, str(tmp_path))[0]
        assert {name: error for name, error in errors.items() if not error <= EXACT} == {} and errors.keys() == CASES.keys()


def test_a_memory_smaller_than_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss\.memory=23 is less than schedule\.batch_size=24"):
        config(tmp_path, tmp_path / "run", loss={"memory": 23})
    assert config(tmp_path, tmp_path / "run", loss={"memory": 24}).loss.memory == 24


def _state(epoch: int, batches_done: int, divided_in: int, learners: int) -> TrainState:
    division = division_by_hand(np.arange(8), learners)
    return TrainState(epoch=epoch, batches_done=batches_done, division=division.__class__(**{**vars(division), "epoch": divided_in}))


def test_when_the_memory_is_emptied(tmp_path: Path) -> None:
    """Before the first step after a division and of the conquer phase; not in mid-epoch, so that a resume does not do it again."""
    cfg = config(tmp_path, tmp_path / "run", division={"every": 2, "conquer_from": 5, "num_learners": 4}, schedule={"epochs": 9})
    divisions = {0: 0, 1: 0, 2: 2, 3: 2, 4: 4, 5: 4, 6: 6, 7: 6}
    emptied = {epoch for epoch, made in divisions.items() if plan.subspaces_change(cfg, _state(epoch, 0, made, 4))}
    assert emptied == {0, 2, 4, 5}  # later divisions choose batches only
    assert not any(plan.subspaces_change(cfg, _state(epoch, 1, made, 4)) for epoch, made in divisions.items())
    one = config(tmp_path, tmp_path / "run", division={"every": 2, "num_learners": 1}, schedule={"epochs": 9})
    assert not any(plan.subspaces_change(one, _state(epoch, 0, made, 1)) for epoch, made in divisions.items())
