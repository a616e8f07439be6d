"""What all Triton kernels share: whether this is the interpreter, and which dtypes and widths they take.

The interpreter (TRITON_INTERPRET=1, set before the first import) runs kernels in numpy. It has no libdevice and no bf16x3, and it
computes bfloat16 wrongly. So kernels widen what they load when INTERPRETED, and use float32 products there.
"""

from __future__ import annotations

import os

import torch
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 8192


def check_dtypes(**values: Tensor | None) -> None:
    """Raise ValueError for a tensor whose dtype or width the Triton kernels do not take."""
    for name, value in values.items():
        if value is None:
            continue
        if value.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {value.dtype}; the Triton kernels take float32, bfloat16 and float16 (DNC_KERNELS=reference computes any)"
            )
        if value.ndim == 2 and value.shape[1] > WIDEST:
            raise ValueError(f"{name} is {value.shape[1]} wide; the Triton kernels take up to {WIDEST} (DNC_KERNELS=reference any)")
