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
from dnc_dist.engine.setup import build_engine, build_objective, quiet_third_parties, set_learning_rates
from dnc_dist.processes import distributed

Layout = Literal["even", "uneven", "a rank without rows"]
BatchNorm = Literal["frozen", "global"]

SIZE, CLASSES, ROWS, PER_CLASS = 16, 12, 12, 3
LEARNERS = 4
SEED = 7
SETTINGS: dict[str, dict[str, Any]] = {
    "margin, fixed beta, learned masks": {},
    "margin, beta per class, learned masks": {"loss": {"name": "margin", "learn_beta": "class"}},
    "margin, fixed beta, fixed masks": {"model": {"masks": "fixed"}},
    "proxy_anchor, learned masks": {"loss": {"name": "proxy_anchor", "scale": 16.0}},
}
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


_NORMS: tuple[BatchNorm, ...] = ("frozen", "global")
_LAYOUTS: tuple[Layout, ...] = ("even", "uneven", "a rank without rows")
# Of the steps of the engine.
DEEPSPEED_CASE = Case("margin, beta per class, learned masks", "global", 2, "even")
CASES = [Case(*parts) for parts in itertools.product(SETTINGS, _NORMS, (1, 2), _LAYOUTS)]


class Outcome(NamedTuple):
    """What a step gives, averaged over ranks as DeepSpeed does: the loss () and the gradient of every trained tensor, by name.

    Of several steps of the DeepSpeed engine: the losses, and what they changed in every tensor.
    """

    loss: Tensor
    tensors: dict[str, Tensor]


def outcomes(progress: Progress, dtype: torch.dtype = torch.float32, seed: int = SEED) -> dict[str, Outcome]:
    """Collective. What every case gives on all ranks together, and last the steps of the DeepSpeed engine, which knows no float64.

    Args:
        dtype: of the computation, torch.float32 or torch.float64.
        seed: of parameters and images.
    """
    # fp32 as such: a GPU may use neither TF32 nor kernels that add up in another order each time.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    quiet_third_parties()
    groups = distributed.rank_groups(max(case.learners for case in CASES))
    found = {}
    with progress.phase("parity", len(CASES) + 1, "cases") as phase:
        for case in CASES:
            found[str(case)] = _outcome(case, groups, dtype, seed)
            phase.update()
        if dtype == torch.float32:
            found[DEEPSPEED] = _deepspeed(DEEPSPEED_CASE, groups, seed)
        phase.update()
    return found


def _config(case: Case) -> RunConfig:
    tree: dict[str, dict[str, Any]] = {
        "data": {"root": ".", "image_size": SIZE, "augment": "none"},
        "model": {"backbone": "conv4", "weights": "none", "embedding_dim": 16, "batch_norm": case.batch_norm, "dropout": 0.0},
        "loss": {"name": "margin"},
        "division": {
            "num_learners": LEARNERS,
            "every": 1,
            "backbone_frozen_epochs": 0,
            "learners_per_step": case.learners,
            "mask_penalty": 0.3,
        },
        "schedule": {"epochs": 1, "batch_size": ROWS, "samples_per_class": PER_CLASS},
        "engine": {"zero": 1, "precision": "fp32"},
    }
    changes: Mapping[str, dict[str, Any]] = SETTINGS[case.setting]
    return parse_tree({name: {**section, **changes.get(name, {})} for name, section in tree.items()}, "doctor")


def _objective(cfg: RunConfig, dtype: torch.dtype, seed: int) -> DncObjective:
    """The smooth network with masks, boundaries and statistics that are not those of the start, equal on every rank."""
    objective = build_objective(cfg, CLASSES).train()
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


def _global_batch(learners: int, step: int, seed: int) -> Batch:
    """The step's rows in canonical order, learner by learner and class by class: noisy patterns, one per class."""
    numbers = generator("doctor", "images", step, seed)
    labels = torch.arange(ROWS) // PER_CLASS
    patterns = torch.randint(40, 216, (ROWS // PER_CLASS, 3, 4, 4), generator=numbers).float()
    pixels = patterns.repeat_interleave(4, 2).repeat_interleave(4, 3)[labels] + 50 * torch.randn(ROWS, 3, SIZE, SIZE, generator=numbers)
    return Batch(
        images=pixels.clamp(0, 255).to(torch.uint8),
        labels=labels,
        learner=(torch.arange(ROWS) * learners // ROWS + step) % LEARNERS,
        rows=torch.randperm(1000, generator=numbers)[:ROWS],
        positions=torch.arange(ROWS),
        valid=torch.ones(ROWS, dtype=torch.bool),
        failed=[],
        step=step,
        rows_of_ranks=[ROWS],
    )


def _bounds(count: int, ranks: int, layout: Layout) -> list[int]:
    """Where the parts of ``count`` rows begin and end on so many ranks: ranks + 1 numbers."""
    if layout == "even":
        return [count * at // ranks for at in range(ranks + 1)]
    if layout == "uneven":
        return [count * at * (at + 1) // (ranks * (ranks + 1)) for at in range(ranks + 1)]
    return [*_bounds(count, max(ranks - 1, 1), "even"), count][: ranks + 1]


def _local_batch(learners: int, layout: Layout, grouped: bool, step: int, seed: int) -> Batch:
    """This rank's part of the step. With groups, the group's ranks share the rows of one learner."""
    whole = _global_batch(learners, step, seed)
    world, rank = distributed.world_size(), distributed.rank()
    parts = learners if grouped else 1
    ranks, count = world // parts, ROWS // parts
    group, me = divmod(rank, ranks)
    bounds = _bounds(count, ranks, layout)
    rows_of_ranks = [max(1, stop - start) for start, stop in itertools.pairwise(bounds)]
    start, stop = group * count + bounds[me], group * count + bounds[me + 1]
    if start == stop:
        return dummy(step, SIZE, rows_of_ranks).to(distributed.device())
    images, labels, learner, rows, positions, valid = (tensor[start:stop] for tensor in whole[:6])
    local = Batch(images, labels, learner, rows, positions, valid, failed=[], step=step, rows_of_ranks=rows_of_ranks)
    return local.to(distributed.device())


def _outcome(case: Case, groups: Mapping[int, ProcessGroup], dtype: torch.dtype, seed: int) -> Outcome:
    objective = _objective(_config(case), dtype, seed)
    # A group may be of one rank, which cannot be without rows: there, all ranks share all learners.
    group = None if case.layout == "a rank without rows" else groups.get(case.learners)
    batch = _local_batch(case.learners, case.layout, group is not None, step=1, seed=seed)
    loss, _ = objective(batch, Phase(1, LEARNERS, conquer=False, backbone_frozen=False), group=group, max_positives=PER_CLASS - 1)
    loss.backward()
    world = distributed.world_size()
    trained = {name: value for name, value in objective.named_parameters() if value.requires_grad}
    grads = [torch.zeros_like(value) if value.grad is None else value.grad for value in trained.values()]
    mean = distributed.all_reduce_sum(parameters_to_vector(grads)) / world
    parts = mean.split([value.numel() for value in trained.values()])
    return Outcome((distributed.all_reduce_sum(loss) / world).cpu(), {name: part.cpu() for name, part in zip(trained, parts, strict=True)})


def _deepspeed(case: Case, groups: Mapping[int, ProcessGroup], seed: int) -> Outcome:
    """Losses of a few steps of the real engine, and what they changed."""
    cfg = _config(case)
    objective = _objective(cfg, torch.float32, seed)
    before = {name: value.detach().clone() for name, value in objective.named_parameters()}
    engine = build_engine(objective, cfg)
    for group in engine.optimizer.param_groups:
        # Adam divides a gradient by its size: where it is 0 but for rounding, the usual eps of 1e-8 would make steps of the rounding.
        group["eps"] = 1.0
    losses = []
    for step in range(DEEPSPEED_STEPS):
        set_learning_rates(engine, dict.fromkeys(("backbone", "embedding", "masks", "loss"), 10.0))
        ranks = groups.get(case.learners)
        batch = _local_batch(case.learners, case.layout, ranks is not None, step, seed)
        loss, stats = engine(batch, Phase(step, LEARNERS, False, False), group=ranks, max_positives=PER_CLASS - 1)
        engine.backward(loss)
        engine.step()
        losses.append(stats["loss"])
    return Outcome(torch.stack(losses).cpu(), {name: (value.detach() - before[name]).cpu() for name, value in objective.named_parameters()})
