"""Parity: a step on W ranks against the same step on one rank, which a process of its own computes on this very machine.

The error of a case is measured tensor by tensor: the length of the difference between the mean gradient over W ranks and the
gradient on one rank, relative to the length of the latter; the largest of all trained tensors counts, and of BatchNorm's running
statistics. The error of the loss is its difference relative to its value. For the steps of the DeepSpeed engine the losses and the
changes of the parameters take their places.

What fp32 loses in a case depends on its numbers and on the processor, so the limit is measured with it: the same process computes
the case in float64, too, and what one rank in fp32 differs from that is the case's rounding. W ranks round as often as one, only
elsewhere: they and one rank may differ by ``TIMES`` as much, by ``FLOOR`` where one rank was lucky, and never by ``HIGHEST``, which
would be no rounding of fp32 any more. A lost row or a wrong factor changes a gradient by several per cent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dnc_dist.base.progress import Progress
from dnc_dist.doctor.harness import Outcome, relative_error
from dnc_dist.doctor.steps import DEEPSPEED, DEEPSPEED_STEPS, Plan, outcomes
from dnc_dist.doctor.table import Check, Section
from dnc_dist.processes import distributed

TIMES, FLOOR, HIGHEST = 10.0, 32 * torch.finfo(torch.float32).eps, 1e-3
_MOST_SECONDS = 900.0
# Variables that tell a process of its place among others; the reference has none.
_OF_THE_LAUNCH = (
    "RANK",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "WORLD_SIZE",
    "MASTER_",
    "TORCHELASTIC_",
    "SLURM_",
    "PMI",
    "DNC_ERROR_FILE",
    "DNC_LAUNCHER",
)
_HINT = "different versions, GPUs or settings on the ranks change results: see `dnc-dist doctor env`; else this is a bug"


class Error(NamedTuple):
    """Relative errors of one case, the tensor with the largest one, and below what they must stay."""

    loss: float
    gradient: float
    tensor: str
    limit: float

    @property
    def share(self) -> float:
        """Of the limit."""
        return max(self.loss, self.gradient) / self.limit


def check_parity(plan: Plan, unchecked: Sequence[Check] = ()) -> Section:
    """Collective. Every case on all ranks against one rank.

    Args:
        plan: the cases.
        unchecked: rows for what is no case, as it cannot be computed here.

    Raises:
        RuntimeError: the reference on one rank failed; with its output.
    """
    if not distributed.is_main():
        outcomes(plan, Progress(False))
        return distributed.broadcast_object(None)
    with _reference(plan) as reference:
        found = outcomes(plan, Progress(True))
        section = _judge(plan, compare(plan, found, *reference()), unchecked)
    return distributed.broadcast_object(section)


def compare(plan: Plan, found: dict[str, Outcome], expected: dict[str, Outcome], exact: dict[str, Outcome]) -> dict[str, Error]:
    """The errors of each case on W ranks relative to one rank, judged by those of one rank relative to float64."""
    errors = {}
    for name, outcome in found.items():
        # The steps of the engine add up the errors of their gradients.
        measured, steps = (str(plan.deepspeed_case), DEEPSPEED_STEPS) if name == DEEPSPEED else (name, 1)
        rounding = max(max(_errors(expected[measured], exact[measured]))[0], relative_error(expected[measured].loss, exact[measured].loss))
        loss, (gradient, tensor) = relative_error(outcome.loss, expected[name].loss), max(_errors(outcome, expected[name]))
        errors[name] = Error(loss, gradient, tensor, limit(rounding, steps))
    return errors


def limit(rounding: float, steps: int = 1) -> float:
    """Below what the relative difference of two computations in fp32 must stay of which one differs by ``rounding`` from float64."""
    return min(steps * (TIMES * rounding + FLOOR), HIGHEST)


def _errors(found: Outcome, expected: Outcome) -> list[tuple[float, str]]:
    """Of every tensor, with its name."""
    return [(relative_error(value, expected.tensors[name]), name) for name, value in found.tensors.items()]


def _judge(plan: Plan, errors: dict[str, Error], unchecked: Sequence[Check]) -> Section:
    groups = {setting: {name: error for name, error in errors.items() if name.startswith(f"{setting};")} for setting in plan.settings}
    groups |= {DEEPSPEED: {DEEPSPEED: errors[DEEPSPEED]}}
    checks = [*(_check(name, group) for name, group in groups.items()), *unchecked]
    loss, gradient = max(error.loss for error in errors.values()), max(error.gradient for error in errors.values())
    values: dict[str, Any] = {
        "max_relative_error_loss": loss,
        "max_relative_error_gradient": gradient,
        "limit": max(error.limit for error in errors.values()),
        "cases": [{"case": name, **error._asdict()} for name, error in errors.items()],
    }
    note = (
        f"{distributed.world_size()} ranks against 1, largest relative error of loss and of any gradient tensor; "
        f"limit: {TIMES:.0f} times what fp32 loses on 1 rank; conv4 in fp32 with smooth activations"
    )
    return Section("parity", note, checks, values)


def _check(name: str, errors: dict[str, Error]) -> Check:
    worst = max(errors, key=lambda case: errors[case].share)
    loss, gradient = max(error.loss for error in errors.values()), max(error.gradient for error in errors.values())
    what = "parameter changes" if name == DEEPSPEED else "gradient"
    value = (
        f"{len(errors)} case(s): loss {loss:.1e}, {what} {gradient:.1e}, {errors[worst].share:.0%} of the limit {errors[worst].limit:.1e}"
    )
    if errors[worst].share < 1:
        return Check(name, value)
    return Check(name, value, "failed", f"worst: {worst}, {errors[worst].tensor}; {_HINT}")


@contextmanager
def _reference(plan: Plan) -> Iterator[Callable[[], list[dict[str, Outcome]]]]:
    """Start the cases on one rank beside us; what is yielded waits for their outcomes, in fp32 and in float64."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_THE_LAUNCH)}
    with tempfile.TemporaryDirectory(prefix="dnc-dist-doctor-") as folder, open(f"{folder}/output", "w+", encoding="utf-8") as output:
        path = f"{folder}/outcomes.pt"
        Path(f"{folder}/plan.json").write_text(json.dumps(plan), encoding="utf-8")
        # It finds the modules of others where this process found them.
        environment["PYTHONPATH"] = os.pathsep.join(place for place in sys.path if place)
        command = [sys.executable, "-m", "dnc_dist.doctor.reference", f"{folder}/plan.json", path]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

        def result() -> list[dict[str, Outcome]]:
            try:
                code = process.wait(_MOST_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(f"the reference on one rank does not end within {_MOST_SECONDS:.0f} s") from error
            if code:
                output.seek(0)
                raise RuntimeError(f"the reference on one rank ended with exit code {code}:\n{output.read()}")
            return [{name: Outcome(*parts) for name, parts in found.items()} for found in torch.load(path)]

        try:
            yield result
        finally:
            process.kill()
            process.wait()
