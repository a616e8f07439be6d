"""What all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

# As many threads here as in the processes that tests start, which are compared with this one: sums depend on the number.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

# A shell starts background jobs with SIGINT ignored, nohup with SIGHUP, and children inherit that; the tests of both need the default.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Triton reads this when a kernel's module is imported: without a GPU the kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module", autouse=True)
def _no_process_group_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests of the next file begin without one."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail(f"{request.node.name} left a process group behind")
