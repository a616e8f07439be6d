"""Every loss: its value, its statistics and its gradients on 2 and 4 processes are those on one. Embeddings stand for the network."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dnc_dist.base import parts
from dnc_dist.loss.base import Loss, StepRows
from dnc_dist.processes import distributed
from tests.engine_fixtures import relative_error
from tests.rounding import EXACT
from tests.spawn import spawn

FOREIGN = ["tests.foreign_losses:LogisticLoss", "tests.foreign_losses:DroppedClassifierLoss"]
LOSSES = [{"name": name, **options} for name in [*parts.TABLE["loss"], *FOREIGN] for options in parts.load("loss", name).examples]
CLASSES, DIM, LEARNERS = 6, 8, 3
# The second class has a row in one learner only; the last row of the fourth could not be decoded.
LABELS = torch.tensor([0, 0, 0, 1, 2, 2, 0, 0, 3, 3, 5, 5, 5, 5])
UNDECODABLE = 9


class Layout(NamedTuple):
    """Whose rows they are and how they lie on the ranks; ``grouped``: each of the learners has ranks of its own, if there are enough."""

    learners: int
    conquer: bool = False
    split: str = "even"
    grouped: bool = False
    counted: bool = True


LAYOUTS = {
    "1 learner": Layout(1),
    "2 learners, uneven rows": Layout(2, split="uneven", counted=False),
    "2 learners in groups": Layout(2, grouped=True),
    "2 learners, a rank without rows": Layout(2, split="a rank without rows"),
    "conquer": Layout(1, conquer=True, split="uneven"),
}


def _bounds(count: int, ranks: int, split: str) -> list[int]:
    if split == "even":
        return [count * at // ranks for at in range(ranks + 1)]
    if split == "uneven":
        return [count * at * (at + 1) // (ranks * (ranks + 1)) for at in range(ranks + 1)]
    return [*_bounds(count, max(ranks - 1, 1), "even"), count][: ranks + 1]


class Outcome(NamedTuple):
    """Means over ranks of the loss and of the gradients of all rows' embeddings, of the masks and of the loss's parameters; stats."""

    loss: Tensor
    stats: dict[str, Tensor]
    gradients: dict[str, Tensor]


def _outcome(loss: Loss, layout: Layout, groups: dict[int, ProcessGroup]) -> Outcome:
    numbers = torch.Generator().manual_seed(3)
    every = torch.randn(len(LABELS), DIM, generator=numbers, dtype=torch.float64)
    masks = torch.randn(LEARNERS, DIM, generator=numbers, dtype=torch.float64).abs().requires_grad_()
    if layout.conquer:
        every = torch.nn.functional.normalize(every)
    learner = torch.zeros_like(LABELS) if layout.conquer else 2 * (torch.arange(len(LABELS)) * layout.learners // len(LABELS))
    learner[UNDECODABLE] = -1
    world, rank = distributed.world_size(), distributed.rank()
    group = groups.get(layout.learners) if layout.grouped else None
    share = layout.learners if group is not None else 1
    (number, me), count = divmod(rank, world // share), len(LABELS) // share
    bounds = _bounds(count, world // share, layout.split)
    start, stop = number * count + bounds[me], number * count + bounds[me + 1]
    here = torch.arange(start, stop)
    empty = not len(here)
    if empty:  # a dummy row
        here = torch.zeros(1, dtype=torch.int64)
    x = every[here].clone().requires_grad_()
    rows = StepRows(
        x,
        None if layout.conquer else masks,
        labels=LABELS[here],
        learner=-torch.ones(1, dtype=torch.int64) if empty else learner[here],
        row_ids=-torch.ones(1, dtype=torch.int64) if empty else 7 * here + 1,
        num_learners=1 if layout.conquer else LEARNERS,
        seed=5,
        step=4,
        rows_of_ranks=[max(1, after - before) for before, after in itertools.pairwise(bounds)],
        group=group,
        max_positives=5 if layout.counted else None,
    )
    value, stats = loss.of_step(rows)
    loss.zero_grad()
    value.backward()
    of_rows = torch.zeros_like(every)
    assert x.grad is not None
    if empty:
        assert not x.grad.any()
    else:
        of_rows[here] = x.grad
    gradients = {"embeddings": of_rows, **{name: parameter.grad for name, parameter in loss.named_parameters()}}
    if not layout.conquer:
        gradients["masks"] = masks.grad
    assert all(gradient is not None for gradient in gradients.values()), "ranks that disagree about it would reduce different tensors"
    return Outcome(
        distributed.all_reduce_sum(value) / world,
        stats,
        {name: distributed.all_reduce_sum(gradient) / world for name, gradient in gradients.items()},
    )


def _compute(place: str) -> dict[str, dict[str, float]]:
    """On one process, write what it finds to ``place``; on several, the errors relative to that."""
    groups = distributed.rank_groups(2)
    errors = {}
    for at, options in enumerate(LOSSES):
        torch.manual_seed(at)
        loss: Loss = parts.build("loss", options, num_classes=CLASSES, embedding_dim=DIM).double()
        for name, layout in LAYOUTS.items():
            found, file = _outcome(loss, layout, groups), f"{place}/{at}-{name}.pt"
            if distributed.world_size() == 1:
                torch.save(found, file)
                continue
            expected: Outcome = torch.load(file, weights_only=False)
            assert found.stats.keys() == expected.stats.keys() and found.gradients.keys() == expected.gradients.keys()
            stats = {key: relative_error(value.nan_to_num(-1), expected.stats[key].nan_to_num(-1)) for key, value in found.stats.items()}
            gradients = {key: relative_error(value, expected.gradients[key]) for key, value in found.gradients.items()}
            errors[f"{at}-{name}"] = {"value": relative_error(found.loss, expected.loss), **stats, **gradients}
    return errors


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the outcomes of one process."""
    folder = tmp_path_factory.mktemp("parity")
    spawn(_compute, 1, str(folder))
    return folder


@pytest.fixture(scope="module")
def errors(place: Path) -> dict[int, dict[str, dict[str, float]]]:
    """By number of processes, on each rank."""
    return {world: spawn(_compute, world, str(place)) for world in (2, 4)}


CASES = [pytest.param(f"{at}-{name}", id=f"{options} {name}") for at, options in enumerate(LOSSES) for name in LAYOUTS]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_equal_one(errors: dict[int, list[dict[str, dict[str, float]]]], world: int, case: str) -> None:
    for of_rank in errors[world]:
        assert {key: error for key, error in of_rank[case].items() if not error <= EXACT} == {}


@pytest.mark.parametrize("case", CASES)
def test_cases_are_not_trivial(place: Path, case: str) -> None:
    outcome: Outcome = torch.load(place / f"{case}.pt", weights_only=False)
    assert outcome.stats["loss"] > 0
    assert [name for name, gradient in outcome.gradients.items() if not gradient.any()] == []
