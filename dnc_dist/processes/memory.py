"""The memory that this process has taken."""

from __future__ import annotations

import resource
import sys

import torch

from dnc_dist.processes import distributed

MB = 1e6


def peak_memory_mb() -> float:
    """The most that this process ever had: of the GPU's memory if it computes there, else of the machine's."""
    if distributed.device().type == "cuda":
        return torch.cuda.max_memory_allocated() / MB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB
