"""Training lines: what steps returned, turned into numbers at the log interval only, so that the device is rarely waited for."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dnc_dist.base.wording import listed
from dnc_dist.data.stream import Batch
from dnc_dist.engine.finite import FiniteGuard
from dnc_dist.processes import distributed, watchdog
from dnc_dist.processes.memory import peak_memory_mb
from dnc_dist.processes.transfer import to_host
from dnc_dist.rundir.tracker import Tracker

_log = logging.getLogger(__name__)
_SUMS = {"positive_distance": ("positive_distance_sum", "positive_pairs"), "negative_distance": ("negative_distance_sum", "negative_pairs")}
"""Shown as a quotient of two sums over the logged steps."""


class StepLog:
    """Collects the stats of steps and logs them every so many steps: means over the steps of losses and counts."""

    def __init__(self, tracker: Tracker, every: int, guard: FiniteGuard) -> None:
        self.tracker, self.every, self.guard = tracker, every, guard
        self.note = ""
        self._stats: list[dict[str, Tensor]] = []
        self._rates: dict[str, float] = {}
        self._rows, self._waited = 0, 0.0
        self._since, self._waited_before = time.monotonic(), 0.0
        self._traffic_before = distributed.traffic()

    def step(self, step: int, epoch: int, stats: dict[str, Tensor], rates: dict[str, float], rows: int, waited: float) -> None:
        """Collective. Take in one step; log if it is time.

        Args:
            stats: what the objective returned.
            rates: learning rate of each parameter group.
            rows: of the global batch.
            waited: seconds that this rank has waited for data in this epoch.

        Raises:
            RunError: something was not finite in the steps that are logged now.
        """
        self._stats.append(stats)
        self._rows, self._waited, self._rates = self._rows + rows, waited, rates
        self.guard.step()
        if step % self.every == 0:
            self.flush(step, epoch)

    def flush(self, step: int, epoch: int) -> None:
        """Collective. Log the steps since the last line.

        Raises:
            RunError: something was not finite; the line is logged before.
        """
        if not self._stats:
            return
        logged = _on_host(self._stats)
        seconds = max(time.monotonic() - self._since, 1e-9)
        names = sorted({name for stats in logged for name in stats} - {"learner_loss"})
        values: dict[str, Any] = {
            name: float(torch.stack([stats[name].double() for stats in logged if name in stats]).mean()) for name in names
        }
        for name, (total, count) in _SUMS.items():
            if total in values:
                values[name] = values.pop(total) / max(values[count], 1e-9)
        per_learner = torch.stack([stats["learner_loss"] for stats in logged]).nanmean(0)
        values |= {f"learner_loss/{a}": float(value) for a, value in enumerate(per_learner) if not torch.isnan(value)}
        values |= {f"lr/{name}": rate for name, rate in self._rates.items()} | {"lr": self._rates["embedding"]}
        values |= {"images_per_second": self._rows / seconds, "share_data": (self._waited - self._waited_before) / seconds}
        traffic = distributed.traffic()
        for kind, before in self._traffic_before.items():
            values[f"bytes/{kind}"] = (traffic[kind] - before) / len(logged)
        self._traffic_before = traffic
        self.tracker.log("train", step, epoch, values)
        self.guard.check(logged, step, epoch)
        self.note = f"loss {values['loss']:.4f}"
        self._stats, self._rows = [], 0
        self._since, self._waited_before = time.monotonic(), self._waited


def _on_host(stats: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The stats of steps, read from the device together."""
    values = iter(to_host([value for step in stats for value in step.values()]))
    return [{name: next(values) for name in step} for step in stats]


class TimedBatches:
    """Batches, and the seconds spent waiting for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches, self.waited = batches, 0.0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            started = time.monotonic()
            batch = next(self._batches, None)
            self.waited += time.monotonic() - started
            if batch is None:
                return
            yield batch


class EpochShares:
    """What the time of an epoch went to."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.seconds = {"divide": 0.0, "train": 0.0, "evaluate": 0.0, "data": 0.0}
        self.rows = 0
        self.counts: dict[str, int] = {}

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the time inside to a part, and tell the watchdog that it begins."""
        watchdog.phase(f"epoch {self.epoch}, start of {part}")
        started = time.monotonic()
        yield
        self.seconds[part] += time.monotonic() - started

    def values(self) -> dict[str, float]:
        """What the tracker logs; ``data`` (waiting for batches) is a part of ``train``."""
        total = max(self.seconds["divide"] + self.seconds["train"] + self.seconds["evaluate"], 1e-9)
        shares = {f"share_{part}": self.seconds[part] / total for part in ("divide", "evaluate", "data")}
        rate = self.rows / max(self.seconds["train"], 1e-9)
        return {"seconds": total, **shares, "images_per_second": rate, "memory_mb": peak_memory_mb()}


def report_failed(failed: set[str]) -> int:
    """Collective. Name the images that could not be decoded in an epoch, once each, and forget them; their number.

    Args:
        failed: keys of those that this rank met.
    """
    keys = sorted({key for part in distributed.gather_objects(failed) for key in part})
    failed.clear()
    if keys:
        _log.warning("%d image(s) cannot be decoded and take part in nothing: %s", len(keys), listed(keys, 10))
    return len(keys)
