"""Parity: a step on W ranks against the same step on one rank, which a process of its own computes on this very machine.

The error of a case is measured tensor by tensor: the length of the difference between the mean gradient over W ranks and the
gradient on one rank, relative to the length of the latter; the largest of all trained tensors counts. The error of the loss is
its difference relative to its value. For the steps of the DeepSpeed engine the losses and the changes of the parameters take
their places. Both must stay below ``LIMIT``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dnc_dist import distributed
from dnc_dist.doctor.steps import DEEPSPEED, SETTINGS, Outcome, outcomes
from dnc_dist.doctor.table import Check, Section
from dnc_dist.progress import Progress

LIMIT = 1e-5
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
    """Relative errors of one case, and the tensor with the largest one."""

    loss: float
    gradient: float
    tensor: str


def check_parity() -> Section:
    """Collective. Every case on all ranks against one rank.

    Raises:
        RuntimeError: the reference on one rank failed; with its output.
    """
    if not distributed.is_main():
        outcomes(Progress(False))
        return distributed.broadcast_object(None)
    with _reference() as reference:
        found = outcomes(Progress(True))
        section = _judge(compare(found, reference()))
    return distributed.broadcast_object(section)


def compare(found: dict[str, Outcome], expected: dict[str, Outcome]) -> dict[str, Error]:
    """The errors of each case."""
    errors = {}
    for name, outcome in found.items():
        of_tensors = {key: relative_error(value, expected[name].tensors[key]) for key, value in outcome.tensors.items()}
        worst = max(of_tensors, key=lambda key: of_tensors[key])
        errors[name] = Error(relative_error(outcome.loss, expected[name].loss), of_tensors[worst], worst)
    return errors


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Length of the difference relative to the expected length; the length itself where 0 is expected; huge for NaN or infinity."""
    difference, size = float((found - expected).double().norm()), float(expected.double().norm())
    error = difference / size if size else difference
    # JSON has neither NaN nor infinity.
    return error if error < sys.float_info.max else sys.float_info.max


def _judge(errors: dict[str, Error]) -> Section:
    groups = {setting: {name: error for name, error in errors.items() if name.startswith(f"{setting};")} for setting in SETTINGS}
    groups |= {DEEPSPEED: {DEEPSPEED: errors[DEEPSPEED]}}
    checks = [_check(name, group) for name, group in groups.items()]
    loss, gradient = max(error.loss for error in errors.values()), max(error.gradient for error in errors.values())
    values: dict[str, Any] = {
        "max_relative_error_loss": loss,
        "max_relative_error_gradient": gradient,
        "limit": LIMIT,
        "cases": [{"case": name, **error._asdict()} for name, error in errors.items()],
    }
    note = (
        f"{distributed.world_size()} ranks against 1, largest relative error of loss and of any gradient tensor, limit {LIMIT:.0e}; "
        f"conv4 in fp32 with smooth activations"
    )
    return Section("parity", note, checks, values)


def _check(name: str, errors: dict[str, Error]) -> Check:
    worst = max(errors, key=lambda case: max(errors[case].loss, errors[case].gradient))
    loss, gradient = max(error.loss for error in errors.values()), max(error.gradient for error in errors.values())
    what = "parameter changes" if name == DEEPSPEED else "gradient"
    value = f"{len(errors)} case(s): loss {loss:.1e}, {what} {gradient:.1e}"
    if max(loss, gradient) < LIMIT:
        return Check(name, value)
    return Check(name, value, "failed", f"worst: {worst}, {errors[worst].tensor}; {_HINT}")


@contextmanager
def _reference() -> Iterator[Callable[[], dict[str, Outcome]]]:
    """Start the cases on one rank beside us; what is yielded waits for their outcomes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_THE_LAUNCH)}
    with tempfile.TemporaryDirectory(prefix="dnc-dist-doctor-") as folder, open(f"{folder}/output", "w+", encoding="utf-8") as output:
        path = f"{folder}/outcomes.pt"
        command = [sys.executable, "-m", "dnc_dist.doctor.reference", path]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

        def result() -> dict[str, Outcome]:
            if code := process.wait():
                output.seek(0)
                raise RuntimeError(f"the reference on one rank ended with exit code {code}:\n{output.read()}")
            return {name: Outcome(*parts) for name, parts in torch.load(path).items()}

        try:
            yield result
        finally:
            process.kill()
            process.wait()
