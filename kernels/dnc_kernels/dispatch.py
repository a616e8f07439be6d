"""Which implementation serves a tensor: Triton on a GPU, plain torch elsewhere, or the one that DNC_KERNELS names.

The choice depends on the device and the environment alone. A failure never changes it: what was chosen runs, or raises.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ParamSpec, TypeVar

import torch

from dnc_kernels.contract import Rows
from dnc_kernels.toolchain import check_launch, use_cache_folder

P = ParamSpec("P")
R = TypeVar("R")

VARIABLE = "DNC_KERNELS"
OLDEST_CAPABILITY = (8, 0)  # the first with matrix products in bfloat16
TRITON_MODULES = {
    "project": "dnc_kernels.margin",
    "sample_pairs": "dnc_kernels.sampling",
    "margin_loss_on_pairs": "dnc_kernels.margin",
    "margin_loss": "dnc_kernels.margin",
    "lloyd_step": "dnc_kernels.kmeans",
}
_triton_functions: dict[str, Callable[..., Any]] = {}  # filled at first use: a machine without Triton runs the reference


def _constant_when_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """What torch.compiler.assume_constant_result does, without its import of the whole compiler: 2.5 seconds in every process."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def _why_not_triton(device: torch.device) -> str | None:
    """What keeps Triton from serving this device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "Triton serves the CPU in its interpreter only, set TRITON_INTERPRET=1 for that"
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"there is no Triton for device {device.type} here"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return "compute capability {}.{} is below {}.{}".format(*capability, *OLDEST_CAPABILITY)
    return None


@_constant_when_compiled
def implementation(device: torch.device | str) -> str:
    """Name of the implementation that serves tensors on this device, "reference" or "triton".

    Raises:
        RuntimeError: the environment variable DNC_KERNELS asks for one that does not exist or cannot run here.
    """
    device = torch.device(device)
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "reference", "triton"):
        raise RuntimeError(f"{VARIABLE}={wanted}: does not exist; allowed are reference and triton, unset means the default")
    if wanted == "triton":
        reason = _why_not_triton(device)
        if reason is not None:
            raise RuntimeError(f"{VARIABLE}=triton cannot run on {device}: {reason}; unset the variable or set {VARIABLE}=reference")
        return "triton"
    return "triton" if wanted == "" and device.type == "cuda" and _why_not_triton(device) is None else "reference"


@_constant_when_compiled
def _is_current(device: torch.device) -> bool:
    return device.type != "cuda" or device.index == torch.cuda.current_device()


@_constant_when_compiled  # torch.compile cannot look into an import
def _load_triton(name: str) -> None:
    if name in _triton_functions:
        return
    use_cache_folder()
    _triton_functions[name] = getattr(importlib.import_module(TRITON_MODULES[name]), name)


def implementation_note(device: torch.device | str) -> str:
    """One line for the start of a run: what computes mining, loss and Lloyd steps on this device, and why."""
    device, wanted = torch.device(device), os.environ.get(VARIABLE, "")
    name = implementation(device)
    what = "fused Triton kernels" if name == "triton" else "plain torch"
    if wanted:
        reason = f"; {VARIABLE}={wanted}"
    elif name == "reference" and device.type == "cuda":
        reason = f"; {_why_not_triton(device)}, so memory grows with anchors x references"
    else:
        reason = ""
    return f"dnc_kernels: {name} implementation ({what}{reason})"


def check_implementation(device: torch.device | str) -> None:
    """Prove that the implementation for this device runs: Triton compiles and launches a kernel. The reference needs no proof.

    Raises:
        RuntimeError: it does not; says what is missing.
    """
    device = torch.device(device)
    if implementation(device) == "triton":
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            check_launch(device)


def dispatched(function: Callable[P, R]) -> Callable[P, R]:
    """The function of the contract. At every call the device of the first argument (a tensor or `Rows`) decides who serves it."""
    name = function.__name__

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()), None)
        first = first.z if isinstance(first, Rows) else first
        device = first.device if isinstance(first, torch.Tensor) else torch.device("cpu")
        if implementation(device) == "reference":
            return function(*args, **kwargs)
        _load_triton(name)
        kernel = _triton_functions[name]
        if _is_current(device):
            return kernel(*args, **kwargs)
        with torch.cuda.device(device):  # Triton launches on the current device, wherever the tensors are
            return kernel(*args, **kwargs)

    return call
