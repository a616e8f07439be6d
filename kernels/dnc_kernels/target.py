"""What all Triton kernels share: is this the interpreter, how exact is a product, which logarithm, which dtypes.

The interpreter (TRITON_INTERPRET=1, before the first import) runs kernels in numpy. It has no libdevice, no bf16x3, and
computes bfloat16 wrongly; kernels therefore widen what they load when INTERPRETED, and use float32 products there.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# float32 operands: three bfloat16 products are as good as float32 for a row weight, tf32 (the default) is not; see README.
DOT_FLOAT32 = tl.constexpr("ieee" if os.environ.get("TRITON_INTERPRET") == "1" else "bf16x3")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 8192


@triton.jit
def log(x):
    """Natural logarithm with an absolute error of about 1e-7: one instruction instead of the 25 of `tl.log`."""
    if INTERPRETED:
        return tl.log(x)
    else:
        return libdevice.fast_logf(x)


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
