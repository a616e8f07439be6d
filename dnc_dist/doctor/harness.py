"""What a step gives on any number of ranks, and how far that is from what it gives on one: for the parity check and for the tests.

Rounding that turns one of a million ReLUs on or off changes a gradient by 0.1 %, on one rank as on many: only a smooth network can be
compared closely. In float64 every sum is exact enough to tell a mistake from rounding without any doubt.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dnc_dist.config import RunConfig
from dnc_dist.data.loading import Batch
from dnc_dist.engine.objective import DncObjective
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_engine, set_learning_rates
from dnc_dist.processes import distributed

Layout = Literal["even", "uneven", "a rank without rows"]
_LR = 10.0


class Outcome(NamedTuple):
    """What a step gives: the mean over ranks of loss and gradients, as DeepSpeed takes it; statistics of the global batch.

    ``loss`` (); ``tensors`` by name the gradient of everything that is trained, and BatchNorm's running statistics. Of several steps of
    the DeepSpeed engine: the losses (steps,), and what they changed in every parameter.
    """

    loss: Tensor
    stats: dict[str, Tensor]
    tensors: dict[str, Tensor]


class Part(NamedTuple):
    """The slots [start, stop) of a step that a rank takes, and the batch rows of every rank that shares them, dummies counted."""

    start: int
    stop: int
    rows_of_ranks: list[int]


def part_of_rank(count: int, groups: int, layout: Layout) -> Part:
    """This rank's part of ``count`` slots. The ranks form so many groups, each with an equal part that lies on its ranks by ``layout``."""
    world, share = distributed.world_size() // groups, count // groups
    group, me = divmod(distributed.rank(), world)
    bounds = [group * share + bound for bound in _bounds(share, world, layout)]
    return Part(bounds[me], bounds[me + 1], [max(1, stop - start) for start, stop in itertools.pairwise(bounds)])


def _bounds(count: int, ranks: int, layout: Layout) -> list[int]:
    """Where the parts of ``count`` slots begin and end on so many ranks: ranks + 1 numbers."""
    if layout == "even":
        return [count * at // ranks for at in range(ranks + 1)]
    if layout == "uneven":
        return [count * at * (at + 1) // (ranks * (ranks + 1)) for at in range(ranks + 1)]
    return [*_bounds(count, max(ranks - 1, 1), "even"), count][: ranks + 1]


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


def in_double(objective: DncObjective) -> DncObjective:
    """The objective, changed in place: it computes in float64 from the same fp32 parameters and pixels."""
    objective.double()
    backbones = [objective.backbone] if objective.teacher is None else [objective.backbone, objective.teacher.backbone]
    for backbone in backbones:
        backbone.register_forward_pre_hook(lambda module, images: tuple(pixels.double() for pixels in images))
    return objective


def shake(objective: DncObjective, level: int, numbers: torch.Generator) -> DncObjective:
    """The objective, changed in place: masks, boundaries and BatchNorm are not those of the start; leaves of each learner stay equal."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers)

    with torch.no_grad():
        masks = objective.masks
        if masks.learned:
            parents = normal(level, masks.embedding_dim) + 0.7
            masks.masks.copy_(parents.repeat_interleave(masks.num_learners // level, 0))
        for name, value in objective.named_parameters():
            if value.dim() <= 1:  # beta, BatchNorm, the bias
                value.add_(0.1 * normal(*value.shape).to(value.device))
            elif name.startswith("backbone"):
                value.mul_(2.0)
        for name, buffer in objective.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * normal(*buffer.shape).to(buffer.device))
            elif name.endswith("running_var"):
                buffer.mul_(0.5 + torch.rand(buffer.shape, generator=numbers).to(buffer.device))
    return objective


def step_outcome(objective: DncObjective, batch: Batch, phase: Phase) -> Outcome:
    """Collective. What one step of the objective gives, without an engine.

    Raises:
        RuntimeError: ranks disagree about which parameters have a gradient; DeepSpeed would add up different tensors.
    """
    loss, stats = objective(batch.to(distributed.device()), phase)
    loss.backward()
    trained = {name: value for name, value in objective.named_parameters() if value.requires_grad}
    found = mean_outcome(loss, stats, {name: value.grad for name, value in trained.items()}, trained)
    running = {name: buffer.cpu() for name, buffer in objective.named_buffers() if "running" in name}
    return found._replace(tensors=found.tensors | running)


def mean_outcome(loss: Tensor, stats: dict[str, Tensor], gradients: Mapping[str, Tensor | None], of: Mapping[str, Tensor]) -> Outcome:
    """Collective. The outcome of what each rank has: its loss (), and its gradients of the tensors ``of``; None is one of zeros.

    Raises:
        RuntimeError: ranks disagree about which are None.
    """
    missing = distributed.gather_objects([name for name in of if gradients[name] is None])
    if any(names != missing[0] for names in missing):
        raise RuntimeError(f"ranks disagree about which parameters have no gradient: {missing}")
    parts = [torch.zeros_like(value) if (grad := gradients[name]) is None else grad for name, value in of.items()]
    mean = (distributed.all_reduce_sum(torch.cat([part.flatten() for part in parts])) / distributed.world_size()).cpu()
    cut = zip(of.items(), mean.split([part.numel() for part in parts]), strict=True)
    return Outcome(
        (distributed.all_reduce_sum(loss.detach()) / distributed.world_size()).cpu(),
        {name: value.detach().cpu() for name, value in stats.items()},
        {name: part.view(value.shape) for (name, value), part in cut},
    )


def engine_outcome(objective: DncObjective, cfg: RunConfig, steps: Iterable[tuple[Batch, Phase]]) -> Outcome:
    """Collective. Losses of steps of a run's own engine (DeepSpeed's; of one process the plain one), in float32, and what they changed."""
    before = {name: value.detach().clone() for name, value in objective.named_parameters()}
    engine: Any = build_engine(objective, cfg)
    for group in engine.optimizer.param_groups:
        # Adam divides a gradient by its size: where it is 0 but for rounding, the usual eps of 1e-8 would make steps of the rounding.
        group["eps"] = 1.0
    losses = []
    for batch, phase in steps:
        rates = dict.fromkeys(("backbone", "embedding", "masks", "loss"), _LR)
        set_learning_rates(engine, rates | ({"backbone": 0.0} if phase.backbone_frozen else {}))
        loss, stats = engine(batch.to(distributed.device()), phase)
        engine.backward(loss)
        engine.step()
        losses.append(stats["loss"])
    changes = {name: (value.detach() - before[name]).cpu() for name, value in objective.named_parameters()}
    return Outcome(torch.stack(losses).cpu(), {}, changes)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Length of the difference relative to the expected length; the length itself where 0 is expected; huge for NaN or infinity."""
    difference, size = float((found - expected).double().norm()), float(expected.double().norm())
    error = difference / size if size else difference
    # JSON has neither NaN nor infinity.
    return error if error < sys.float_info.max else sys.float_info.max


def errors_of(found: Outcome, expected: Outcome) -> dict[str, float]:
    """Relative errors of the loss, of every statistic, and of the tensors. NaN (a learner without rows) equals NaN.

    Raises:
        ValueError: the outcomes have other statistics or tensors.
    """
    if found.stats.keys() != expected.stats.keys() or found.tensors.keys() != expected.tensors.keys():
        raise ValueError(f"outcomes of {[*found.stats, *found.tensors]} cannot be compared with {[*expected.stats, *expected.tensors]}")
    stats = {name: relative_error(value.nan_to_num(-1), expected.stats[name].nan_to_num(-1)) for name, value in found.stats.items()}
    return {"scaled loss": relative_error(found.loss, expected.loss), **stats, **tensor_errors(found.tensors, expected.tensors)}


def tensor_errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative errors of the tensors of backbone, head, masks and loss, of each as one vector, and of the worst single tensor."""
    parts: dict[str, list[str]] = {}
    for name in found:
        parts.setdefault("running statistics" if "running" in name else f"tensors of {name.split('.')[0]}", []).append(name)
    vectors = {part: [torch.cat([each[name].flatten() for name in names]) for each in (found, expected)] for part, names in parts.items()}
    errors = {part: relative_error(*pair) for part, pair in vectors.items()}
    return errors | {"worst tensor": max(relative_error(value, expected[name]) for name, value in found.items())}
