"""Which implementation of the contract runs. There is one so far: the reference."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

VARIABLE = "DNC_KERNELS"


def implementation(device: torch.device | str) -> str:
    """Name of the implementation that serves tensors on this device: always "reference" in this release.

    Raises:
        RuntimeError: the environment variable DNC_KERNELS asks for one that does not exist.
    """
    torch.device(device)  # refuses what is no device
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "reference"):
        reason = "is not in this release" if wanted == "triton" else "does not exist"
        raise RuntimeError(f"{VARIABLE}={wanted}: this implementation {reason}; unset the variable or set {VARIABLE}=reference")
    return "reference"


def implementation_note(device: torch.device | str) -> str:
    """One line for the start of a run: what computes mining, loss and Lloyd steps on this device."""
    note = f"dnc_kernels: {implementation(device)} implementation (plain torch)"
    if torch.device(device).type == "cuda":
        note += "; there is no fused GPU kernel in this release, results are the same, memory grows with anchors x references"
    return note


def dispatched(function: Callable[P, R]) -> Callable[P, R]:
    """The reference function, refused where DNC_KERNELS asks for another implementation."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()), None)
        implementation(first.device if isinstance(first, torch.Tensor) else "cpu")
        return function(*args, **kwargs)

    return call
