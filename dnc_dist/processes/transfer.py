"""Copies between the host and its device that the host does not wait for.

Whatever waits for a GPU waits for all that it was asked before, and while the host then prepares the next work, the GPU has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device; the same tensor if that is the CPU.

    A GPU fetches them by itself from pinned memory. Other memory may be moved by the system, so it would be waited for.
    """
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the CPU, with one copy and one wait for each dtype of those on a device; shapes are kept."""
    found = list(tensors)
    for dtype in {tensor.dtype for tensor in found if tensor.device.type != "cpu"}:
        places = [at for at, tensor in enumerate(found) if tensor.dtype == dtype and tensor.device.type != "cpu"]
        together = torch.cat([found[at].flatten() for at in places]).cpu()
        for at, part in zip(places, together.split([found[at].numel() for at in places]), strict=True):
            found[at] = part.view(found[at].shape)
    return found


class Later:
    """A value that a device has yet to compute, for the host to read later.

    It is copied to the host right after it was computed. So reading it waits for what the device was asked before, not for what it was
    asked since.
    """

    def __init__(self, value: Tensor) -> None:
        # Such a copy goes to pinned memory.
        self._value = value.to("cpu", non_blocking=True)
        self._copied = None if value.device.type == "cpu" else torch.cuda.Event()
        if self._copied is not None:
            self._copied.record()

    def read(self) -> Tensor:
        """The value, on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value
