"""The promise of the project: loss, gradients and curve on 2 and 4 processes are those on one. Real gloo processes, real images."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.distributed import ProcessGroup

from dnc_dist.config import RunConfig
from dnc_dist.data.index import open_index
from dnc_dist.doctor.harness import Outcome, engine_outcome, errors_of, in_double, shake, smooth, step_outcome
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.objective import DncObjective
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_objective
from dnc_dist.processes import distributed
from tests.engine_fixtures import against_one, config, damage, division_by_hand, kept, make_dataset
from tests.rounding import EXACT, NEIGHBOUR, TIMES, move_weights
from tests.spawn import spawn

STEP = 7
LEARNERS = 4
LOSSES: dict[str, dict[str, Any]] = {
    "margin": {},
    "margin, scalar beta": {"learn_beta": "scalar"},
    "margin, beta per class": {"learn_beta": "class"},
    "proxy anchor": {"name": "proxy_anchor", "scale": 16.0},
}
# The others are compared in test_loss_parity.py: what is around a loss does not know which one it is.
OTHER_LOSSES: list[dict[str, Any]] = [
    {"name": "multi_similarity"},
    {"name": "tests.foreign_losses:LogisticLoss"},
    {"name": "tests.foreign_losses:DroppedClassifierLoss"},
]
# Negatives beyond distance 0.02 are not drawn, and positives are active beyond 1.7 only.
NOTHING_ACTIVE = {"beta": 1.9, "cutoff": 0.01, "nonzero_loss_cutoff": 0.02}


class Case(NamedTuple):
    """One step: what differs from the fixture's configuration, and where the training stands.

    ``only``: so many rows of each learner are not left out; ``data``: "whole", "damaged" (some images cannot be decoded), or
    "unreadable" (none can).
    """

    changes: dict[str, dict[str, Any]]
    level: int = LEARNERS
    conquer: bool = False
    frozen: bool = False
    only: int | None = None
    data: str = "whole"


def _together(learners: int) -> dict[str, Any]:
    return {"learners_per_step": learners}


def _cases() -> dict[str, Case]:
    cases = {}
    for loss, options in LOSSES.items():
        for norm in ("frozen", "global"):
            changes = {"loss": options, "model": {"batch_norm": norm}}
            for level, m in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)) if "beta" not in loss else ((4, 2),):
                cases[f"{loss}; {norm} batch norm; {m} of {level} learners"] = Case({**changes, "division": _together(m)}, level)
            cases[f"{loss}; {norm} batch norm; conquer, clustered"] = Case({**changes, "division": _together(2)}, conquer=True)
            if "beta" not in loss:
                cases[f"{loss}; {norm} batch norm; conquer, whole"] = Case(changes, level=1, conquer=True)
    uneven = {"batch_size": 10, "samples_per_class": 5}
    for loss in ("margin", "proxy anchor"):
        options = LOSSES[loss]
        cases |= {
            f"{loss}; 10 rows": Case({"loss": options, "schedule": uneven}),
            f"{loss}; 3 rows": Case({"loss": options, "schedule": uneven}, only=3),
            f"{loss}; 3 rows of each of 2 learners": Case({"loss": options, "division": _together(2)}, only=3),
            f"{loss}; frozen backbone, dropout": Case({"loss": options, "division": _together(2), "model": {"dropout": 0.4}}, frozen=True),
            f"{loss}; dropout": Case({"loss": options, "model": {"dropout": 0.4}}),
            f"{loss}; colour": Case({"loss": options, "data": {"augment": "color"}}),
            f"{loss}; fixed masks": Case({"loss": options, "model": {"masks": "fixed"}}, level=2),
            f"{loss}; undecodable images": Case({"loss": options}, data="damaged", level=1),
            f"{loss}; undecodable images, 2 learners a step": Case({"loss": options, "division": _together(2)}, data="damaged"),
            f"{loss}; no image of one of 2 learners": Case({"loss": options, "division": _together(2)}, only=3, level=2, data="damaged"),
            f"{loss}; no image can be decoded": Case({"loss": options}, data="unreadable"),
            f"{loss}; no image can be decoded, 2 learners": Case({"loss": options, "division": _together(2)}, data="unreadable"),
        }
    for options in OTHER_LOSSES:
        label = options["name"].rpartition(":")[2]
        cases |= {
            f"{label}; 1 of 4 learners": Case({"loss": options}, frozen=True),
            f"{label}; 2 of 4 learners, undecodable images": Case({"loss": options, "division": _together(2)}, frozen=True, data="damaged"),
            f"{label}; conquer, 10 rows": Case({"loss": options, "schedule": uneven}, conquer=True),
        }
    taught: dict[str, dict[str, Any]] = {"division": {"distill": 50.0, "conquer_from": 3}, "schedule": {"epochs": 4}}
    frozen = taught["division"] | {"distill_teacher": "frozen"}
    for loss in ("margin", "proxy anchor"):
        options, split = LOSSES[loss], {"masks": {"name": "learned", "split_scale": 0.3}}
        cases |= {
            f"{loss}; conquer, taught": Case({**taught, "loss": options}, conquer=True),
            f"{loss}; conquer, taught by a frozen copy": Case(
                {**taught, "loss": options, "division": frozen, "model": split}, conquer=True
            ),
            f"{loss}; conquer, taught, undecodable images": Case({**taught, "loss": options}, conquer=True, data="damaged", level=1),
            f"{loss}; masks that part at splits": Case({"loss": options, "model": split, "division": _together(2)}, level=2),
        }
    sliced = {"model": {"masks": "sliced"}, "division": {"mode": "flat"}}
    return cases | {
        "margin; sliced masks": Case(sliced),
        "margin; sliced masks, conquer": Case(sliced, conquer=True),
        "margin; no active pair": Case({"loss": NOTHING_ACTIVE}),
        "margin; no active pair, 2 learners a step": Case({"loss": NOTHING_ACTIVE, "division": _together(2)}),
        "margin; published sampling": Case({"loss": {"mode": "reference", "learn_beta": "scalar"}}),
    }


CASES = _cases()
# How many learners share a step has nothing to do with BatchNorm: where its statistics are frozen, one way of sharing does every day.
SLOW = [name for name in CASES if "frozen batch norm" in name and "learners" in name and "2 of 4" not in name]
PARAMETERS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
WITHOUT_PAIRS = [name for name in CASES if "no active pair" in name or "no image can" in name]
ZERO_CHANGES: dict[str, dict[str, Any]] = {
    "division": {"learners_per_step": 2, "num_learners": LEARNERS},
    "loss": {"learn_beta": "class"},
    "model": {"dropout": 0.2},
    "data": {"augment": "color"},
}
ZERO_STEPS = 4
ZERO_WORLDS = (1, 4)


@functools.cache
def _groups() -> dict[int, ProcessGroup]:
    return distributed.rank_groups(LEARNERS)


def _objective(data: RunData, cfg: RunConfig, level: int) -> DncObjective:
    objective = shake(build_objective(cfg, data.train.num_classes).train(), level, torch.Generator().manual_seed(11))
    smooth(objective.backbone)
    return objective


def case_outcome(case: Case, cfg: RunConfig, dtype: torch.dtype) -> Outcome:
    data = RunData(cfg)
    objective = _objective(data, cfg, case.level)
    if dtype == torch.float64:
        in_double(objective)
    schedule = data.schedule(division_by_hand(data.train.labels, case.level, case.only), 0, conquer=case.conquer)
    batch = next(data.train_batches(schedule, first_step=STEP, skip=0, group=_groups().get(schedule.turns.shape[1])))
    return step_outcome(objective, batch, Phase(STEP, case.level, case.conquer, case.frozen))


def curve(cfg: RunConfig, *, neighbour: bool = False) -> Outcome:
    """A few steps of the DeepSpeed engine; in the second one the backbone waits."""
    data = RunData(cfg)
    objective = _objective(data, cfg, LEARNERS)
    if neighbour:
        move_weights(objective)
    schedule = data.schedule(division_by_hand(data.train.labels, LEARNERS), 0, conquer=False)
    batches = (
        next(data.train_batches(schedule, first_step=number, skip=number % len(schedule), group=_groups().get(2)))
        for number in range(ZERO_STEPS)
    )
    return engine_outcome(objective, cfg, ((batch, Phase(at, LEARNERS, False, at == 1)) for at, batch in enumerate(batches)))


def _compute(names: list[str], roots: dict[str, str], place: str) -> dict[str, dict[str, float]]:
    """Errors of cases relative to what one process finds, which it leaves at ``place``."""
    run = Path(place) / "run"
    errors = {}
    for name in names:
        case = CASES[name]
        found = case_outcome(case, config(Path(roots[case.data]), run, **case.changes), torch.float64)
        if distributed.is_main():
            errors[name] = against_one(found, Path(place) / f"{name}.pt")
    for zero in (0, 1, 2) if distributed.world_size() in ZERO_WORLDS else ():
        cfg = config(Path(roots["whole"]), run, **ZERO_CHANGES, engine={"zero": zero})
        found, file = curve(cfg), Path(place) / "curve.pt"
        if distributed.world_size() == 1 and zero == 0:
            torch.save(tuple(found), file)
            errors["neighbour"] = errors_of(curve(cfg, neighbour=True), found)
        if distributed.is_main():
            errors[f"ZeRO {zero}"] = errors_of(found, kept(file))
    return errors


class Found(NamedTuple):
    """Where the outcomes of one process are, and the errors of 1, 2 and 4."""

    place: Path
    errors: dict[int, dict[str, dict[str, float]]]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Of the cases that this session tests."""
    here = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    tested = {item.callspec.params.get("name") for item in here if hasattr(item, "callspec")}
    names = [name for name in CASES if name in tested]
    place = tmp_path_factory.mktemp("parity")
    whole = make_dataset(place / "dataset")
    # All rows of one of two learners with three rows each, and some more.
    learner_of = division_by_hand(open_index(whole).view("train").labels, level=2, only=3).learner_of
    broken = [*np.flatnonzero(learner_of == learner_of[0]).tolist(), 8, 9, 10, 31]
    roots = {
        "whole": str(whole),
        "damaged": str(damage(whole, place / "damaged", train=broken)),
        "unreadable": str(damage(whole, place / "unreadable", train=list(range(72)))),
    }
    return Found(place, {world: spawn(_compute, world, names, roots, str(place))[0] for world in (1, 2, 4)})


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_gradients_equal_those_of_one_process(found: Found, world: int, name: str) -> None:
    assert {key: error for key, error in found.errors[world][name].items() if not error <= EXACT} == {}


@pytest.mark.parametrize("name", WITHOUT_PAIRS)
def test_step_without_active_pair_has_zero_gradient(found: Found, name: str) -> None:
    outcome = kept(found.place / f"{name}.pt")
    gradients = {key: value for key, value in outcome.tensors.items() if "running" not in key}
    moved = [key for key, value in gradients.items() if not torch.equal(value, torch.zeros_like(value))]
    # The penalty on the masks needs no pair.
    assert moved == ["masks.masks"]
    assert outcome.loss.isfinite() and outcome.stats["loss"] == 0


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name not in WITHOUT_PAIRS])
def test_cases_are_not_trivial(found: Found, name: str) -> None:
    """Comparing zeros would prove nothing: wherever there are pairs, every trained tensor has a gradient."""
    outcome, case = kept(found.place / f"{name}.pt"), CASES[name]
    assert outcome.stats["loss"] > 0
    zero = [key for key, value in outcome.tensors.items() if not value.any()]
    assert zero == [key for key in zero if (case.frozen and key.startswith("backbone")) or (case.conquer and key == "masks.masks")]


@pytest.mark.parametrize(("world", "zero"), [(1, 1), (1, 2), (4, 0), (4, 1), (4, 2)])
def test_deepspeed_takes_the_same_steps_as_zero_0_on_one_process(found: Found, world: int, zero: int) -> None:
    allowed = {key: TIMES * error + NEIGHBOUR for key, error in found.errors[1]["neighbour"].items()}
    assert max(allowed.values()) < 1e-3  # a bug changes more
    assert {key: error for key, error in found.errors[world][f"ZeRO {zero}"].items() if not error <= allowed[key]} == {}
