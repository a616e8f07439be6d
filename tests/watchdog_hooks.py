"""For ``run_fixtures.start``: what makes one rank slow or stuck at a chosen place of a real run."""

from __future__ import annotations

import time
from typing import Any

from tests.run_fixtures import without_report


def sleeping_in_loader(step: int, seconds: float) -> None:
    """For ``before``: this rank's loader sleeps before it gives the batch of a step (counted from 0)."""
    without_report()
    from dnc_dist.data import stream

    load = stream._StepDataset.__getitem__

    def slow(self: Any, request: Any) -> Any:
        if request.step == step:
            time.sleep(seconds)
        return load(self, request)

    stream._StepDataset.__getitem__ = slow  # type: ignore[method-assign]


def sleeping_often(step: int, seconds: float, places: tuple[str, ...], long_seconds: float) -> None:
    """For ``before``: as ``sleeping_in_loader``; and long when these places are first reached: "start", "step", "nmi", "save"."""
    sleeping_in_loader(step, seconds)
    from dnc_dist.engine import evaluate, trainer
    from dnc_dist.rundir import writing

    functions = {
        "start": (trainer, "build_engine"),
        "step": (trainer, "set_learning_rates"),
        "nmi": (evaluate, "kmeans"),
        "save": (writing.CheckpointWriter, "_write"),
    }
    for place in places:
        _sleep_first(*functions[place], long_seconds)


def waiting_alone(step: int) -> None:
    """For ``before``: before a step this rank enters a collective that no other rank enters."""
    without_report()
    from dnc_dist.engine import trainer
    from dnc_dist.processes import distributed

    set_rates, calls = trainer.set_learning_rates, []

    def set_learning_rates(*args: Any) -> None:
        calls.append(1)
        if len(calls) == step + 1:
            distributed.barrier()
        set_rates(*args)

    trainer.set_learning_rates = set_learning_rates


def diverging_from(step: int) -> None:
    """For ``before``: from this step on (counted from 0) the learning rates are beyond all measure."""
    without_report()
    from dnc_dist.engine import trainer

    set_rates, calls = trainer.set_learning_rates, []

    def set_learning_rates(engine: Any, rates: dict[str, float]) -> None:
        calls.append(1)
        set_rates(engine, rates if len(calls) <= step else dict.fromkeys(rates, 1e30))

    trainer.set_learning_rates = set_learning_rates


def _sleep_first(owner: Any, name: str, seconds: float) -> None:
    function, slept = getattr(owner, name), []

    def slow(*args: Any, **options: Any) -> Any:
        if not slept:
            slept.append(True)
            time.sleep(seconds)
        return function(*args, **options)

    setattr(owner, name, slow)
