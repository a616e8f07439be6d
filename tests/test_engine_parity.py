"""The promise of the project: loss, gradients and curve on 2 and 4 processes are those on one. Real gloo processes, real images."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.utils import parameters_to_vector

from dnc_dist.config import RunConfig
from dnc_dist.data.index import open_index
from dnc_dist.doctor.steps import in_double, smooth
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_engine, build_objective, set_learning_rates
from dnc_dist.processes import distributed
from tests.engine_fixtures import config, damage, division_by_hand, make_dataset, relative_error, shake
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
    sliced = {"model": {"masks": "sliced"}, "division": {"mode": "flat"}}
    return cases | {
        "margin; sliced masks": Case(sliced),
        "margin; sliced masks, conquer": Case(sliced, conquer=True),
        "margin; no active pair": Case({"loss": NOTHING_ACTIVE}),
        "margin; no active pair, 2 learners a step": Case({"loss": NOTHING_ACTIVE, "division": _together(2)}),
        "margin; published sampling": Case({"loss": {"mode": "reference", "learn_beta": "scalar"}}),
    }


CASES = _cases()
WITHOUT_PAIRS = [name for name in CASES if "no active pair" in name or "no image can" in name]
ZERO_CHANGES: dict[str, dict[str, Any]] = {
    "division": {"learners_per_step": 2, "num_learners": LEARNERS},
    "loss": {"learn_beta": "class"},
    "model": {"dropout": 0.2},
    "data": {"augment": "color"},
}
ZERO_STEPS = 4
ZERO_WORLDS = (1, 4)
LR = 10.0


class Outcome(NamedTuple):
    """What a step gives: the mean over ranks of loss and gradients, as DeepSpeed takes it; stats; running statistics."""

    loss: Tensor
    stats: dict[str, Tensor]
    tensors: dict[str, Tensor]


@functools.cache
def _groups() -> dict[int, ProcessGroup]:
    return distributed.rank_groups(LEARNERS)


def step_outcome(case: Case, cfg: RunConfig, dtype: torch.dtype) -> Outcome:
    data = RunData(cfg)
    objective = build_objective(cfg, data.train.num_classes).train()
    shake(objective, case.level)
    smooth(objective.backbone)
    if dtype == torch.float64:
        in_double(objective)
    schedule = data.schedule(division_by_hand(data.train.labels, case.level, case.only), 0, conquer=case.conquer)
    batch = next(data.train_batches(schedule, first_step=STEP, skip=0, group=_groups().get(schedule.turns.shape[1])))
    phase = Phase(STEP, case.level, case.conquer, case.frozen)
    loss, stats = objective(batch, phase)
    loss.backward()
    world = distributed.world_size()
    trained = {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}
    missing = [name for name, value in trained.items() if value.grad is None]
    # DeepSpeed reduces what has a gradient: ranks that disagree about it would add up different tensors.
    assert distributed.gather_objects(missing) == [missing] * world
    grads = [torch.zeros_like(value) if value.grad is None else value.grad for value in trained.values()]
    mean = distributed.all_reduce_sum(parameters_to_vector(grads)) / world
    tensors = {
        name: part.view_as(value) for (name, value), part in zip(trained.items(), mean.split([grad.numel() for grad in grads]), strict=True)
    }
    tensors |= {name: buffer for name, buffer in objective.named_buffers() if "running" in name}
    return Outcome(distributed.all_reduce_sum(loss) / world, stats, tensors)


def _curve(cfg: RunConfig, *, neighbour: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of a few steps of the DeepSpeed engine, which knows no float64, and what they changed in the parameters."""
    data = RunData(cfg)
    objective = build_objective(cfg, data.train.num_classes).train()
    shake(objective, LEARNERS)
    smooth(objective.backbone)
    if neighbour:
        move_weights(objective)
    before = {name: value.detach().clone() for name, value in objective.named_parameters()}
    engine = build_engine(objective, cfg)
    for group in engine.optimizer.param_groups:
        # Adam divides a gradient by its size: where it is 0 but for rounding, the usual eps of 1e-8 would make steps of the rounding.
        group["eps"] = 1.0
    schedule = data.schedule(division_by_hand(data.train.labels, LEARNERS), 0, conquer=False)
    losses = []
    for number in range(ZERO_STEPS):
        batch = next(data.train_batches(schedule, first_step=number, skip=number % len(schedule), group=_groups().get(2)))
        set_learning_rates(engine, {"backbone": 0.0 if number == 1 else LR, "embedding": LR, "masks": LR, "loss": LR})
        loss, stats = engine(batch, Phase(number, LEARNERS, False, backbone_frozen=number == 1))
        engine.backward(loss)
        engine.step()
        losses.append(stats["loss"])
    return torch.stack(losses), {name: value.detach() - before[name] for name, value in objective.named_parameters()}


def errors_of(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Errors of the tensors of backbone, head, masks and loss and of running statistics, each as one vector; the largest of a tensor."""
    parts: dict[str, list[str]] = {}
    for name in found:
        parts.setdefault("running statistics" if "running" in name else f"tensors of {name.split('.')[0]}", []).append(name)
    errors = {
        part: relative_error(torch.cat([found[name].flatten() for name in names]), torch.cat([expected[name].flatten() for name in names]))
        for part, names in parts.items()
    }
    return errors | {"worst tensor": max(relative_error(found[name], expected[name]) for name in found)}


def _compute(roots: dict[str, str], place: str) -> dict[str, Any]:
    """On one process, write what it finds to ``place``; on several, the errors relative to that (rank 0 compares)."""
    alone = distributed.world_size() == 1
    run = Path(place) / "run"
    errors: dict[str, Any] = {}
    for number, (name, case) in enumerate(CASES.items()):
        found = step_outcome(case, config(Path(roots[case.data]), run, **case.changes), torch.float64)
        if alone:
            torch.save(found, f"{place}/{number}.pt")
        elif distributed.is_main():
            expected: Outcome = torch.load(f"{place}/{number}.pt", weights_only=False)
            assert found.stats.keys() == expected.stats.keys() and found.tensors.keys() == expected.tensors.keys()
            stats = {key: relative_error(value.nan_to_num(-1), expected.stats[key].nan_to_num(-1)) for key, value in found.stats.items()}
            errors[name] = {"scaled loss": relative_error(found.loss, expected.loss), **stats, **errors_of(found.tensors, expected.tensors)}
    for zero in (0, 1, 2) if distributed.world_size() in ZERO_WORLDS else ():
        cfg = config(Path(roots["whole"]), run, **ZERO_CHANGES, engine={"zero": zero})
        curve = _curve(cfg)
        if alone and zero == 0:
            torch.save(curve, f"{place}/curve.pt")
            errors["neighbour"] = _curve_errors(_curve(cfg, neighbour=True), curve)
        elif distributed.is_main():
            errors[f"ZeRO {zero}"] = _curve_errors(curve, torch.load(f"{place}/curve.pt"))
    return errors


def _curve_errors(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> dict[str, float]:
    return {"losses": relative_error(found[0], expected[0]), **errors_of(found[1], expected[1])}


class Found(NamedTuple):
    """Where the outcomes of one process are, and the errors of 1, 2 and 4."""

    place: Path
    errors: dict[int, dict[str, dict[str, float]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
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
    return Found(place, {world: spawn(_compute, world, roots, str(place))[0] for world in (1, 2, 4)})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_gradients_equal_those_of_one_process(found: Found, world: int, name: str) -> None:
    assert {key: error for key, error in found.errors[world][name].items() if not error <= EXACT} == {}


@pytest.mark.parametrize("name", WITHOUT_PAIRS)
def test_step_without_active_pair_has_zero_gradient(found: Found, name: str) -> None:
    outcome: Outcome = torch.load(found.place / f"{list(CASES).index(name)}.pt", weights_only=False)
    gradients = {key: value for key, value in outcome.tensors.items() if "running" not in key}
    moved = [key for key, value in gradients.items() if not torch.equal(value, torch.zeros_like(value))]
    # The penalty on the masks needs no pair.
    assert moved == ["masks.masks"]
    assert outcome.loss.isfinite() and outcome.stats["loss"] == 0


def test_cases_are_not_trivial(found: Found) -> None:
    """Comparing zeros would prove nothing: wherever there are pairs, every trained tensor has a gradient."""
    for number, (name, case) in enumerate(CASES.items()):
        outcome: Outcome = torch.load(found.place / f"{number}.pt", weights_only=False)
        if name in WITHOUT_PAIRS:
            continue
        assert outcome.stats["loss"] > 0, name
        zero = [key for key, value in outcome.tensors.items() if not value.any()]
        excused = [key for key in zero if (case.frozen and key.startswith("backbone")) or (case.conquer and key == "masks.masks")]
        assert zero == excused, name


@pytest.mark.parametrize(("world", "zero"), [(1, 1), (1, 2), (4, 0), (4, 1), (4, 2)])
def test_deepspeed_takes_the_same_steps_as_zero_0_on_one_process(found: Found, world: int, zero: int) -> None:
    allowed = {key: TIMES * error + NEIGHBOUR for key, error in found.errors[1]["neighbour"].items()}
    assert max(allowed.values()) < 1e-3  # a bug changes more
    assert {key: error for key, error in found.errors[world][f"ZeRO {zero}"].items() if not error <= allowed[key]} == {}
