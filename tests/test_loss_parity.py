"""Every loss: its value, its statistics and its gradients on 2 and 4 processes are those on one. Embeddings stand for the network."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.distributed import ProcessGroup

from dnc_dist.base import parts
from dnc_dist.doctor import harness
from dnc_dist.doctor.harness import Outcome, mean_outcome, part_of_rank
from dnc_dist.loss.base import Loss, StepRows
from dnc_dist.processes import distributed
from tests.engine_fixtures import against_one, kept
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
    split: harness.Layout = "even"
    grouped: bool = False
    counted: bool = True


LAYOUTS = {
    "1 learner": Layout(1),
    "2 learners, uneven rows": Layout(2, split="uneven", counted=False),
    "2 learners in groups": Layout(2, grouped=True),
    "2 learners, a rank without rows": Layout(2, split="a rank without rows"),
    "conquer": Layout(1, conquer=True, split="uneven"),
}


def _outcome(loss: Loss, layout: Layout, groups: dict[int, ProcessGroup]) -> Outcome:
    numbers = torch.Generator().manual_seed(3)
    every = torch.randn(len(LABELS), DIM, generator=numbers, dtype=torch.float64)
    masks = torch.randn(LEARNERS, DIM, generator=numbers, dtype=torch.float64).abs().requires_grad_()
    if layout.conquer:
        every = torch.nn.functional.normalize(every)
    learner = torch.zeros_like(LABELS) if layout.conquer else 2 * (torch.arange(len(LABELS)) * layout.learners // len(LABELS))
    learner[UNDECODABLE] = -1
    group = groups.get(layout.learners) if layout.grouped else None
    share = layout.learners if group is not None else 1
    start, stop, rows_of_ranks = part_of_rank(len(LABELS), share, layout.split)
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
        rows_of_ranks=rows_of_ranks,
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
    trained = dict(loss.named_parameters()) | ({} if layout.conquer else {"masks": masks})
    gradients = {"embeddings": of_rows} | {name: parameter.grad for name, parameter in trained.items()}
    return mean_outcome(value, stats, gradients, of=trained | {"embeddings": every})


def _compute(place: str) -> dict[str, dict[str, float]]:
    """Errors relative to what one process finds, which it leaves at ``place``."""
    groups = distributed.rank_groups(2)
    errors = {}
    for at, options in enumerate(LOSSES):
        torch.manual_seed(at)
        loss: Loss = parts.build("loss", options, num_classes=CLASSES, embedding_dim=DIM).double()
        for name, layout in LAYOUTS.items():
            errors[f"{at}-{name}"] = against_one(_outcome(loss, layout, groups), Path(place) / f"{at}-{name}.pt")
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
    outcome = kept(place / f"{case}.pt")
    assert outcome.stats["loss"] > 0
    assert [name for name, gradient in outcome.tensors.items() if not gradient.any()] == []
