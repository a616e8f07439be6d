"""What steps of the training loop ask of a GPU: launches and waits by part of the step, counted on a simulated one."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from dnc_dist.config import RunConfig
from dnc_dist.data.loading import Batch
from dnc_dist.engine import plan, trainer
from dnc_dist.engine.objective import DncObjective
from dnc_dist.engine.steplog import EpochShares
from dnc_dist.engine.trainer import Trainer
from dnc_dist.engine.zero.plain import PlainEngine
from dnc_dist.processes.signals import StopRequest
from tests.engine_fixtures import division_by_hand
from tests.simulated_device import Device, DeviceTensor

PARTS: dict[str, tuple[type, str]] = {
    "transfer": (Batch, "to"),
    "forward": (DncObjective, "embed"),
    "loss": (DncObjective, "loss_of"),
    "backward": (PlainEngine, "backward"),
    "optimizer": (PlainEngine, "step"),
}
"""Part of a step -> the method that does it; what the loop does beside them is "elsewhere"."""


class Asked(NamedTuple):
    """What one step, or what comes after the last one, asks of the device."""

    launches: dict[str, Counter[str]]
    """Part -> operator -> how often."""
    waits: list[tuple[str, str, str]]
    """Part, operator, line."""
    late_reads: list[int]
    """Of each value that is read later: launches since it was computed."""

    def by_part(self) -> dict[str, int]:
        """Launches of each part."""
        return {part: sum(self.launches.get(part, Counter()).values()) for part in (*PARTS, "elsewhere")}


def last_steps(cfg: RunConfig, level: int, simulated: Device | None) -> tuple[Asked, list[float]]:
    """What the last step of an epoch with ``level`` learners asks for, and the losses of the last two steps.

    Counted is the second of two steps: the first one allocates what all others use. The part "log" is the line of the log after it.

    Args:
        cfg: of a run that is in its first epoch, or in the first one that conquers.
        level: number of learners.
        simulated: None computes on the CPU and counts nothing.
    """
    losses = list[float]()

    def begin(*args: Any) -> Any:
        if simulated is not None:
            simulated.forget()
        return rates(*args)

    def backward(engine: PlainEngine, loss: Tensor) -> None:
        losses.append(float(held(loss).detach()))
        original(engine, loss)

    rates, original = trainer.set_learning_rates, PlainEngine.backward
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(trainer, "set_learning_rates", begin))
        stack.enter_context(mock.patch.object(PlainEngine, "backward", backward))
        if simulated is not None:
            for part, (owner, name) in PARTS.items():
                stack.enter_context(mock.patch.object(owner, name, simulated.inside(part, getattr(owner, name))))
            stack.enter_context(mock.patch.object(trainer.StepLog, "flush", simulated.inside("log", trainer.StepLog.flush)))
        made = Trainer(cfg, "never", StopRequest())
        state = made.state
        state.epoch = cfg.division.conquer_epoch or 0
        state.division = division_by_hand(made.data.train.labels, level)
        schedule = made.data.schedule(state.division, state.epoch, conquer=plan.conquering(cfg, state.epoch))
        state.step = state.batches_done = len(schedule) - 2
        made.train_epoch(EpochShares(state.epoch))
        made.close()
    found = Asked({}, [], []) if simulated is None else Asked(simulated.launches, simulated.waits, simulated.late_reads)
    return found, losses


def held(value: Tensor) -> Tensor:
    """The values of a tensor, wherever it lies."""
    return value.held if isinstance(value, DeviceTensor) else value
