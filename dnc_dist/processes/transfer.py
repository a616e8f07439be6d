"""Copies between the host and its device that the host does not wait for.

Whatever waits for a GPU waits for all that it was asked before, and while the host then prepares the next work, the GPU has none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Place = tuple[Hashable, ...]
"""The keys and positions that lead to a value in dicts, lists and tuples inside each other."""


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
            self._copied.record(torch.cuda.current_stream(value.device))  # of its device, which need not be the current one

    def read(self) -> Tensor:
        """The value, on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value


class EndToEnd(NamedTuple):
    """Tensors that are to be one vector: their elements in this order."""

    pieces: Sequence[Tensor]

    def joined(self) -> Tensor:
        """The vector."""
        return torch.cat([piece.detach().flatten() for piece in self.pieces])


def with_tensors(values: Any, change: Callable[[Place, Tensor | EndToEnd], Tensor], place: Place = ()) -> Any:
    """A copy of dicts, lists and tuples inside each other, with other tensors; numbers and text are taken over.

    Args:
        values: what is copied.
        change: what takes the place of a tensor.
        place: where ``values`` stands.
    """
    if isinstance(values, Tensor | EndToEnd):
        return change(place, values)
    if isinstance(values, dict):
        # Of the same class, and with what torch attaches to the state of a network.
        made = copy.copy(values)
        for key, value in values.items():
            made[key] = with_tensors(value, change, (*place, key))
        return made
    if type(values) in (list, tuple):
        return type(values)(with_tensors(value, change, (*place, at)) for at, value in enumerate(values))
    return values


class Snapshot:
    """A copy of tensors on the host, whose memory is used again for the next copy.

    A GPU copies into pinned memory, in the order of the current stream, and the host does not wait for it. What is computed after
    ``take``, on this stream or on one that waits for it, changes nothing in the copy.
    """

    def __init__(self) -> None:
        self._memory: dict[Place, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, values: Any) -> Any:
        """A copy of dicts, lists and tuples of tensors, numbers and text. From a GPU it is there when ``wait`` has returned.

        The copy before loses its values.
        """
        before, self._memory, self._copied = self._memory, {}, None

        def kept(place: Place, value: Tensor | EndToEnd) -> Tensor:
            pieces = value.pieces if isinstance(value, EndToEnd) else [value]
            memory = self._memory[place] = _memory_for(value, before.pop(place, None))
            targets = [memory]
            if isinstance(value, EndToEnd):
                parts = memory.split([piece.numel() for piece in pieces])
                targets = [part.view(piece.shape) for part, piece in zip(parts, pieces, strict=True)]
            for target, piece in zip(targets, pieces, strict=True):
                target.copy_(piece, non_blocking=True)
            if pieces[0].is_cuda and self._copied is None:
                self._copied = torch.cuda.Event()
            return memory

        copied = with_tensors(values, kept)
        if self._copied is not None:
            self._copied.record()
        return copied

    def wait(self) -> None:
        """Wait until the copy is there; any thread may."""
        if self._copied is not None:
            # A new thread would otherwise begin to use the first GPU.
            with torch.cuda.device(self._copied.device):
                self._copied.synchronize()


def _memory_for(value: Tensor | EndToEnd, before: Tensor | None) -> Tensor:
    """Memory of the host for a copy: that of the copy before, if it fits."""
    one = value.pieces[0] if isinstance(value, EndToEnd) else value
    shape = torch.Size([sum(map(torch.numel, value.pieces))]) if isinstance(value, EndToEnd) else one.shape
    if before is not None and before.shape == shape and before.dtype == one.dtype:
        return before
    if isinstance(value, EndToEnd):
        return torch.empty(shape, dtype=one.dtype, pin_memory=one.is_cuda)
    # As the value lies in memory: so a GPU copies it as it is.
    return torch.empty_like(one, device="cpu", pin_memory=one.is_cuda, requires_grad=False)
