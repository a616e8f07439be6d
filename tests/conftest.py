"""What all tests share."""

from __future__ import annotations

import os
import signal

import torch

# A shell starts background jobs with SIGINT ignored, and children inherit that; the tests of Ctrl-C need its default.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton reads this when a kernel's module is imported: without a GPU the kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
