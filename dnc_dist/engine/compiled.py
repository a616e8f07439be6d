"""The backbone through torch's compiler, for the steps of a training (``engine.compile``).

Only those: divisions, evaluation and a loaded model compute as they do without, so retrieval measures what a loaded model gives.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.model.batch_norm import GlobalBatchNorm2d
from dnc_dist.processes import distributed


class CompiledBackbone:
    """A backbone, compiled at its first call for each kind of call: with and without gradient, of one and of any number of rows.

    It uses the backbone's own parameters and is no module: no name in a checkpoint tells of it.

    Args:
        backbone: with ``model.batch_norm`` applied.
        device: that it is going to compute on.

    Raises:
        InputError: nothing can be compiled here, or not this backbone.
    """

    def __init__(self, backbone: nn.Module, device: torch.device) -> None:
        self._backbone = backbone
        self._global = [layer for layer in backbone.modules() if isinstance(layer, GlobalBatchNorm2d)]
        if self._global and distributed.world_size() > 1:
            raise InputError(
                "engine.compile=true cannot compile what processes exchange inside of the backbone, as they do with global BatchNorm "
                "(model.batch_norm); set engine.compile=false, train on one process, or set model.batch_norm=frozen with model.weights"
            )
        _check_compiler(device)
        # Whole or not at all: in pieces it may be slower than without, and torch would only tell its log.
        self._compiled = torch.compile(lambda pixels: backbone(pixels), fullgraph=True)

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, F).

        Raises:
            RunError: torch cannot compile this backbone.
        """
        if any(layer.valid_rows is not None for layer in self._global):
            # Rare: images that cannot be decoded. Their number changes, and each would be compiled anew.
            rows: Tensor = self._backbone(pixels)
            return rows
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            return self._compiled(pixels)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            raise RunError(
                f"engine.compile=true: torch cannot compile this backbone ({_brief(error)}); set engine.compile=false"
            ) from error


def _check_compiler(device: torch.device) -> None:
    """Prove that something can be compiled here.

    Raises:
        InputError: says what is missing.
    """
    # A number that was never compiled before: what lies in the cache of the compiler proves nothing.
    number = time.time()
    try:
        torch.compile(lambda x: x * number + 1, fullgraph=True)(torch.ones(8, device=device))
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"engine.compile=true: torch can compile nothing on this machine ({_brief(error)}); it needs a C++ compiler (g++, or what "
            "the variable CXX names) and, on a GPU, a C compiler; install it, or set engine.compile=false"
        ) from error


def _brief(error: Exception) -> str:
    """The first line of the error that torch's compiler wrapped, which may be hundreds of lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
