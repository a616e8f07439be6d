"""The training step of one process, timed for the model of scaling; and the loss with the rows of several, without them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.batches import random_batch
from benchmarks.engine_step import EngineStep, synchronize
from benchmarks.scaling_model import StepTimes
from dnc_dist.config import RunConfig
from dnc_dist.data.loading import Batch
from dnc_dist.engine.objective import DncObjective
from dnc_dist.loss.base import StepRows
from dnc_dist.processes import distributed

CLASSES = 1000
LR = 1e-9  # weights stay what they are: the steps of an untrained network on noise must not lead to infinite losses, which are cheaper
WARM_UP = 2


def step_times(cfg: RunConfig, rows: Sequence[int], *, calls: int, steps: int) -> StepTimes:
    """Time the steps of one process, which take turns, so that other work on the machine meets all of them alike.

    Args:
        cfg: what is trained; its data is not read.
        rows: of the batches; two different numbers at least.
        calls: of loss and optimizer; the median counts.
        steps: whole steps with each number of rows.
    """
    plain, deepspeed = EngineStep(cfg, CLASSES, lr=LR), EngineStep(cfg, CLASSES, lr=LR, deepspeed=True)
    batches, least, most = {b: noise(cfg, b) for b in rows}, min(rows), max(rows)
    seconds: dict[int, list[float]] = {b: [] for b in rows}
    longer = []
    for number in range(WARM_UP + steps):
        for b, batch in batches.items():
            seconds[b].append(_seconds(partial(plain, batch, number)))
        # It does not depend on the rows, and stands out most in a short step.
        longer.append(_seconds(partial(deepspeed, batches[least], number)) - seconds[least][-1])
    medians = {b: statistics.median(each[WARM_UP:]) for b, each in seconds.items()}
    few = max(2 * cfg.schedule.samples_per_class, least)
    loss = [
        (a, a * times, median_seconds(_loss(plain.objective, cfg, a, times), calls)) for a in sorted({few, most}) for times in (1, 4, 16)
    ]
    update, longer_update = (_update_seconds(engine, batches[least], calls) for engine in (plain, deepspeed))
    extra = max(0.0, statistics.median(longer[WARM_UP:]))
    return StepTimes(
        parameters=sum(parameter.numel() for parameter in plain.objective.parameters() if parameter.requires_grad),
        groups=len(plain.engine.optimizer.param_groups),
        steps=list(medians.items()),
        loss=loss,
        optimizer=update,
        engine=extra,
        engine_update=min(extra, max(0.0, longer_update - update)),
        jitter=[each / medians[most] for each in seconds[most][WARM_UP:]],
    )


def noise(cfg: RunConfig, rows: int) -> Batch:
    """Noise on this rank's device, as many rows on every rank, of classes with as many rows each as in training, all of learner 0."""
    batch = random_batch(rows, cfg.data.image_size, per_class=cfg.schedule.samples_per_class, classes=CLASSES)
    return batch.to(distributed.device())


def median_seconds(call: Callable[[], Any], calls: int) -> float:
    """Of several calls, after one that warms up."""
    call()
    return statistics.median(_seconds(call) for _ in range(calls))


def _seconds(call: Callable[[], Any]) -> float:
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


def _update_seconds(step: EngineStep, batch: Batch, calls: int) -> float:
    """Median of what follows the backward pass. It costs the same for any number of rows."""
    seconds = []
    for number in range(1 + calls):
        step.engine.backward(step.forward(batch, number))
        seconds.append(_seconds(step.update))
    return statistics.median(seconds[1:])


@dataclass(frozen=True)
class _RowsOfMany(StepRows):
    """Rows of the first of several ranks. What the others hold is made up, by dtype, and nothing is sent."""

    others: Mapping[torch.dtype, torch.Tensor] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        return not self.others

    def gather(self, rows: torch.Tensor, grad: str = "none") -> torch.Tensor:
        mine = rows.detach() if grad == "none" else rows
        if rows.dtype == torch.int32:  # the pairs that were drawn
            return mine.repeat(len(self.rows_of_ranks), 1)
        return torch.cat([mine, self.others[rows.dtype][:, : rows.shape[1]]]) if self.others else mine


def _loss(objective: DncObjective, cfg: RunConfig, anchors: int, times: int) -> Callable[[], None]:
    """Mining and loss of one rank's anchors against the rows of `times` ranks, forward and backward; nothing is sent."""
    device, every = distributed.device(), anchors * times
    made = torch.nn.functional.normalize(torch.randn(every, cfg.model.embedding_dim), dim=1).to(device)
    number, nothing = torch.arange(every, device=device), torch.zeros(every, dtype=torch.int64, device=device)
    labels = number // cfg.schedule.samples_per_class % CLASSES
    columns = torch.stack([labels, nothing, number], 1)
    rows = _RowsOfMany(
        made[:anchors].clone().requires_grad_(),
        None,
        *columns[:anchors].unbind(1),
        num_learners=1,
        seed=0,
        step=0,
        rows_of_ranks=[anchors] * times,
        max_positives=cfg.schedule.samples_per_class - 1,
        others={} if times == 1 else {made.dtype: made[anchors:], columns.dtype: columns[anchors:]},
    )
    return lambda: objective.loss.of_step(rows)[0].backward()
