"""The steps that the parity check compares: small real steps of the objective on synthetic images, on any number of ranks.

The network is the built-in conv4 in fp32 with GELU for ReLU and average for maximum pooling. Rounding that turns one of a
million ReLUs on or off changes a gradient by 0.1 %, on one rank as on many: only a smooth network can be compared closely.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.utils import parameters_to_vector

from dnc_dist.base.progress import Progress
from dnc_dist.base.rng import generator
from dnc_dist.config import RunConfig, parse_tree
from dnc_dist.data.loading import Batch, dummy
from dnc_dist.engine.objective import DncObjective
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_engine, build_objective, set_learning_rates
from dnc_dist.engine.zero import quiet_third_parties
from dnc_dist.processes import distributed

Layout = Literal["even", "uneven", "a rank without rows"]
BatchNorm = Literal["frozen", "global"]

SIZE, PER_CLASS = 16, 3
SEED = 7
DEEPSPEED_STEPS = 3
DEEPSPEED = f"DeepSpeed, ZeRO 1, {DEEPSPEED_STEPS} steps"
_NORMS: tuple[BatchNorm, ...] = ("frozen", "global")
_LAYOUTS: tuple[Layout, ...] = ("even", "uneven", "a rank without rows")


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
        return [Case(*parts) for parts in itertools.product(self.settings, _NORMS, self.learners, _LAYOUTS)]

    @property
    def deepspeed_case(self) -> Case:
        """Of the steps of the engine."""
        return Case(self.last or list(self.settings)[-1], "global", self.learners[-1], "even")

    @property
    def rows(self) -> int:
        """Of a step: two classes for each of the learners that share it."""
        return 2 * PER_CLASS * max(2, *self.learners)


class Outcome(NamedTuple):
    """What a step gives, averaged over ranks as DeepSpeed does: the loss () and the gradient of every trained tensor, by name.

    Of several steps of the DeepSpeed engine: the losses, and what they changed in every tensor.
    """

    loss: Tensor
    tensors: dict[str, Tensor]


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


def _objective(cfg: RunConfig, classes: int, dtype: torch.dtype, seed: int) -> DncObjective:
    """The smooth network with masks, boundaries and statistics that are not those of the start, equal on every rank."""
    objective = build_objective(cfg, classes).train()
    smooth(objective.backbone)
    numbers = generator("doctor", "parameters", seed)
    state = {**dict(objective.named_parameters()), **dict(objective.named_buffers())}
    with torch.no_grad():
        for name, value in state.items():
            shift = torch.randn(value.shape, generator=numbers).to(value.device)
            if name == "masks.masks" and value.requires_grad:
                value.copy_(shift + 0.7)
            elif name.endswith("running_var"):
                value.mul_(0.5 + shift.abs())
            elif value.dim() == 1:  # beta, BatchNorm, the bias
                value.add_(0.1 * shift)
            elif name.startswith("backbone") and value.requires_grad:
                value.mul_(2.0)
    return in_double(objective) if dtype == torch.float64 else objective


def in_double(objective: DncObjective) -> DncObjective:
    """The objective, changed in place: it computes in float64 from the same fp32 parameters and pixels."""
    objective.double().backbone.register_forward_pre_hook(lambda module, images: tuple(pixels.double() for pixels in images))
    return objective


def smooth(module: nn.Module) -> nn.Module:
    """The network, changed in place: GELU for ReLU and average for maximum pooling."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.GELU())
        elif isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(child.kernel_size))
        else:
            smooth(child)
    return module


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


def _bounds(count: int, ranks: int, layout: Layout) -> list[int]:
    """Where the parts of ``count`` rows begin and end on so many ranks: ranks + 1 numbers."""
    if layout == "even":
        return [count * at // ranks for at in range(ranks + 1)]
    if layout == "uneven":
        return [count * at * (at + 1) // (ranks * (ranks + 1)) for at in range(ranks + 1)]
    return [*_bounds(count, max(ranks - 1, 1), "even"), count][: ranks + 1]


def _local_batch(plan: Plan, learners: int, layout: Layout, group: ProcessGroup | None, step: int, seed: int) -> Batch:
    """This rank's part of the step. The ranks of a group share the rows of one learner; without one, all ranks those of all."""
    whole = _global_batch(plan, learners, step, seed)
    world, rank = distributed.world_size(), distributed.rank()
    parts = 1 if group is None else learners
    ranks, count = world // parts, plan.rows // parts
    number, me = divmod(rank, ranks)
    bounds = _bounds(count, ranks, layout)
    rows_of_ranks = [max(1, stop - start) for start, stop in itertools.pairwise(bounds)]
    start, stop = number * count + bounds[me], number * count + bounds[me + 1]
    images, labels, learner, rows, slots, valid = (tensor[start:stop] for tensor in whole[:6])
    local = Batch(images, labels, learner, rows, slots, valid, failed=[], step=step, rows_of_ranks=rows_of_ranks)
    if start == stop:
        local = dummy(step, SIZE, rows_of_ranks)
    return local._replace(group=group, max_positives=PER_CLASS - 1).to(distributed.device())


def _outcome(plan: Plan, case: Case, groups: Mapping[int, ProcessGroup], dtype: torch.dtype, seed: int) -> Outcome:
    objective = _objective(_config(plan, case), _classes(plan), dtype, seed)
    # A group may be of one rank, which cannot be without rows: there, all ranks share all learners.
    group = None if case.layout == "a rank without rows" else groups.get(case.learners)
    batch = _local_batch(plan, case.learners, case.layout, group, step=1, seed=seed)
    loss, _ = objective(batch, Phase(1, plan.num_learners, conquer=False, backbone_frozen=False))
    loss.backward()
    world = distributed.world_size()
    trained = {name: value for name, value in objective.named_parameters() if value.requires_grad}
    grads = [torch.zeros_like(value) if value.grad is None else value.grad for value in trained.values()]
    mean = distributed.all_reduce_sum(parameters_to_vector(grads)) / world
    parts = mean.split([value.numel() for value in trained.values()])
    return Outcome((distributed.all_reduce_sum(loss) / world).cpu(), {name: part.cpu() for name, part in zip(trained, parts, strict=True)})


def _deepspeed(plan: Plan, groups: Mapping[int, ProcessGroup], seed: int) -> Outcome:
    """Losses of a few steps of the real engine, and what they changed."""
    case = plan.deepspeed_case
    cfg = _config(plan, case)
    objective = _objective(cfg, _classes(plan), torch.float32, seed)
    before = {name: value.detach().clone() for name, value in objective.named_parameters()}
    engine = build_engine(objective, cfg)
    for group in engine.optimizer.param_groups:
        # Adam divides a gradient by its size: where it is 0 but for rounding, the usual eps of 1e-8 would make steps of the rounding.
        group["eps"] = 1.0
    losses = []
    for step in range(DEEPSPEED_STEPS):
        set_learning_rates(engine, dict.fromkeys(("backbone", "embedding", "masks", "loss"), 10.0))
        batch = _local_batch(plan, case.learners, case.layout, groups.get(case.learners), step, seed)
        loss, stats = engine(batch, Phase(step, plan.num_learners, False, False))
        engine.backward(loss)
        engine.step()
        losses.append(stats["loss"])
    return Outcome(torch.stack(losses).cpu(), {name: (value.detach() - before[name]).cpu() for name, value in objective.named_parameters()})
