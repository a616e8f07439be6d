"""Training lines: what a step returned, turned into numbers at the log interval only, so that the device is rarely waited for."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from dnc_dist.tracker import Tracker


class StepLog:
    """Collects the stats of steps and logs their means every so many steps."""

    def __init__(self, tracker: Tracker, every: int) -> None:
        self.tracker, self.every = tracker, every
        self.note = ""
        self._stats: list[dict[str, Tensor]] = []
        self._rows, self._waited, self._rates = 0, 0.0, {}
        self._since, self._waited_before = time.monotonic(), 0.0

    def step(self, step: int, epoch: int, stats: dict[str, Tensor], rates: dict[str, float], rows: int, waited: float) -> None:
        """Take in one step; log if it is time."""
        self._stats.append(stats)
        self._rows, self._waited, self._rates = self._rows + rows, waited, rates
        if step % self.every == 0:
            self.flush(step, epoch)

    def flush(self, step: int, epoch: int) -> None:
        """Log the steps since the last line."""
        if not self._stats:
            return
        seconds = max(time.monotonic() - self._since, 1e-9)
        values: dict[str, Any] = {}
        for name in sorted({name for stats in self._stats for name in stats} - {"learner_loss", "stop"}):
            values[name] = float(torch.stack([stats[name].double() for stats in self._stats if name in stats]).mean())
        per_learner = torch.stack([stats["learner_loss"] for stats in self._stats]).nanmean(0)
        values |= {f"learner_loss/{a}": float(value) for a, value in enumerate(per_learner) if not torch.isnan(value)}
        values |= {f"lr/{name}": rate for name, rate in self._rates.items()} | {"lr": self._rates["embedding"]}
        values |= {"images_per_second": self._rows / seconds, "share_data": (self._waited - self._waited_before) / seconds}
        self.tracker.log("train", step, epoch, values)
        self.note = f"loss {values['loss']:.4f}"
        self._stats, self._rows = [], 0
        self._since, self._waited_before = time.monotonic(), self._waited
