"""The steps that the parity check compares: small real steps of the objective on synthetic images, on any number of ranks.

The network is the built-in conv4, made smooth. How a step is computed and compared stands in ``harness``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch.distributed import ProcessGroup

from dnc_dist.base.progress import Progress
from dnc_dist.base.rng import generator
from dnc_dist.config import RunConfig, parse_tree
from dnc_dist.data.loading import Batch, dummy
from dnc_dist.doctor.harness import Layout, Outcome, engine_outcome, in_double, part_of_rank, shake, smooth, step_outcome
from dnc_dist.engine.objective import DncObjective
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_objective
from dnc_dist.engine.zero import quiet_third_parties
from dnc_dist.processes import distributed

BatchNorm = Literal["frozen", "global"]

SIZE, PER_CLASS = 16, 3
SEED = 7
DEEPSPEED_STEPS = 3
DEEPSPEED = f"DeepSpeed, ZeRO 1, {DEEPSPEED_STEPS} steps"


class Case(NamedTuple):
    """One step: which loss and masks, BatchNorm, how many learners share the batch, and how its rows lie on the ranks."""

    setting: str
    batch_norm: BatchNorm
    learners: int
    layout: Layout

    def __str__(self) -> str:
        rows = self.layout if self.layout == "a rank without rows" else f"{self.layout} rows"
        return f"{self.setting}; {self.batch_norm} batch norm; {self.learners} learner(s) a step; {rows}"


class Plan(NamedTuple):
    """What is checked: name -> changes of the configuration, numbers of learners that share a step, and of all learners."""

    settings: dict[str, dict[str, Any]]
    learners: tuple[int, ...] = (1, 2)
    num_learners: int = 4
    last: str = ""
    """The setting of the steps of the engine; empty: the last one."""

    @property
    def cases(self) -> list[Case]:
        """Every setting with each BatchNorm, number of learners and layout."""
        return [Case(*parts) for parts in itertools.product(self.settings, get_args(BatchNorm), self.learners, get_args(Layout))]

    @property
    def deepspeed_case(self) -> Case:
        """Of the steps of the engine."""
        return Case(self.last or list(self.settings)[-1], "global", self.learners[-1], "even")

    @property
    def rows(self) -> int:
        """Of a step: two classes for each of the learners that share it."""
        return 2 * PER_CLASS * max(2, *self.learners)


def outcomes(plan: Plan, progress: Progress, dtype: torch.dtype = torch.float32, seed: int = SEED) -> dict[str, Outcome]:
    """Collective. What every case gives on all ranks together, and last the steps of the DeepSpeed engine, which knows no float64.

    Args:
        plan: the cases.
        progress: shows how far it is.
        dtype: of the computation, torch.float32 or torch.float64.
        seed: of parameters and images.
    """
    # fp32 as such: a GPU may use neither TF32 nor kernels that add up in another order each time.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    quiet_third_parties()
    groups = distributed.rank_groups(max(plan.learners))
    found = {}
    with progress.phase("parity", len(plan.cases) + 1, "cases") as phase:
        for case in plan.cases:
            found[str(case)] = _outcome(plan, case, groups, dtype, seed)
            phase.update()
        if dtype == torch.float32:
            found[DEEPSPEED] = _deepspeed(plan, groups, seed)
        phase.update()
    return found


def _config(plan: Plan, case: Case) -> RunConfig:
    tree: dict[str, dict[str, Any]] = {
        "data": {"root": ".", "image_size": SIZE, "augment": "none"},
        "model": {"backbone": "conv4", "weights": "none", "embedding_dim": _width(plan), "batch_norm": case.batch_norm, "dropout": 0.0},
        "loss": {"name": "margin"},
        "division": {
            "num_learners": plan.num_learners,
            "every": 1,
            "backbone_frozen_epochs": 0,
            "learners_per_step": case.learners,
            "mask_penalty": 0.3,
        },
        "schedule": {"epochs": 1, "batch_size": plan.rows, "samples_per_class": PER_CLASS},
        "engine": {"zero": 1, "precision": "fp32"},
    }
    changes = plan.settings[case.setting]
    return parse_tree({name: {**section, **changes.get(name, {})} for name, section in tree.items()}, "doctor")


def _width(plan: Plan) -> int:
    """Of the embedding: at least 16, and a multiple of the number of learners, as some masks need it."""
    return -(-16 // plan.num_learners) * plan.num_learners


def _classes(plan: Plan) -> int:
    """Of the training set, of which a step has a part."""
    return plan.rows // PER_CLASS * 3


def _objective(cfg: RunConfig, plan: Plan, dtype: torch.dtype, seed: int) -> DncObjective:
    """The smooth network, equal on every rank, where nothing is as at the start."""
    objective = build_objective(cfg, _classes(plan)).train()
    smooth(objective.backbone)
    shake(objective, plan.num_learners, generator("doctor", "parameters", seed))
    return in_double(objective) if dtype == torch.float64 else objective


def _global_batch(plan: Plan, learners: int, step: int, seed: int) -> Batch:
    """The step's rows in canonical order, learner by learner and class by class: noisy patterns, one per class."""
    numbers, count = generator("doctor", "images", step, seed), plan.rows
    labels = torch.arange(count) // PER_CLASS
    patterns = torch.randint(40, 216, (count // PER_CLASS, 3, 4, 4), generator=numbers).float()
    pixels = patterns.repeat_interleave(4, 2).repeat_interleave(4, 3)[labels] + 50 * torch.randn(count, 3, SIZE, SIZE, generator=numbers)
    return Batch(
        images=pixels.clamp(0, 255).to(torch.uint8),
        labels=labels,
        learner=(torch.arange(count) * learners // count + step) % plan.num_learners,
        rows=torch.randperm(1000, generator=numbers)[:count],
        slots=torch.arange(count),
        valid=torch.ones(count, dtype=torch.bool),
        failed=[],
        step=step,
        rows_of_ranks=[count],
    )


def _local_batch(plan: Plan, learners: int, layout: Layout, group: ProcessGroup | None, step: int, seed: int) -> Batch:
    """This rank's part of the step. The ranks of a group share the rows of one learner; without one, all ranks those of all."""
    start, stop, rows_of_ranks = part_of_rank(plan.rows, 1 if group is None else learners, layout)
    if start == stop:
        local = dummy(step, SIZE, rows_of_ranks)
    else:
        images, labels, learner, rows, slots, valid = (tensor[start:stop] for tensor in _global_batch(plan, learners, step, seed)[:6])
        local = Batch(images, labels, learner, rows, slots, valid, failed=[], step=step, rows_of_ranks=rows_of_ranks)
    return local._replace(group=group, max_positives=PER_CLASS - 1)


def _outcome(plan: Plan, case: Case, groups: Mapping[int, ProcessGroup], dtype: torch.dtype, seed: int) -> Outcome:
    objective = _objective(_config(plan, case), plan, dtype, seed)
    # A group may be of one rank, which cannot be without rows: there, all ranks share all learners.
    group = None if case.layout == "a rank without rows" else groups.get(case.learners)
    return step_outcome(objective, _local_batch(plan, case.learners, case.layout, group, 1, seed), _phase(plan, 1))


def _phase(plan: Plan, step: int) -> Phase:
    return Phase(step, plan.num_learners, conquer=False, backbone_frozen=False)


def _deepspeed(plan: Plan, groups: Mapping[int, ProcessGroup], seed: int) -> Outcome:
    case = plan.deepspeed_case
    cfg, group = _config(plan, case), groups.get(case.learners)
    batches = [_local_batch(plan, case.learners, case.layout, group, step, seed) for step in range(DEEPSPEED_STEPS)]
    steps = [(batch, _phase(plan, batch.step)) for batch in batches]
    return engine_outcome(_objective(cfg, plan, torch.float32, seed), cfg, steps)
