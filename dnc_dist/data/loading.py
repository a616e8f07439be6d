"""What the loaders of training and of sequential passes deliver, and how decoded images become it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from dnc_dist.data.images import DECODE_ERRORS, decode
from dnc_dist.data.index import DatasetIndex
from dnc_dist.data.transforms import Geometry
from dnc_dist.processes.transfer import to_device


class Batch(NamedTuple):
    """This rank's rows of a step, b of them: at least one, a dummy if the rank has no row.

    ``images`` (b, 3, S, S) uint8, in memory (b, S, S, 3); ``labels`` (b,) of the view; ``learner`` (b,), -1: takes part in nothing;
    ``rows`` (b,) of the index, -1: dummy; ``slots`` (b,) in the step's global batch; ``valid`` (b,) bool, False: a dummy or a row that
    failed to decode; ``failed`` the keys of the latter; ``step`` the global step; ``rows_of_ranks`` b on each of the ranks that share the
    step's learners; ``group`` those ranks, None: all; ``rows_of_world`` b on every rank; ``max_positives`` an upper bound of the positives
    that a row has in the step's global batch, equal on all ranks. The last two are None where nobody has counted.
    ``learner_on_host`` is ``learner`` on the CPU, once that lies on a device. A row that is not valid has learner -1.
    """

    images: Tensor
    labels: Tensor
    learner: Tensor
    rows: Tensor
    slots: Tensor
    valid: Tensor
    failed: list[str]
    step: int
    rows_of_ranks: list[int]
    group: ProcessGroup | None = None
    max_positives: int | None = None
    rows_of_world: list[int] | None = None
    learner_on_host: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device, which nobody waits for.

        ``slots`` and ``valid`` stay on the CPU: what is drawn for a slot is drawn there, and what depends on failures is decided there.
        """
        if (device := torch.device(device)).type == "cpu":
            return self
        labels, learner, rows = to_device(torch.stack([self.labels, self.learner, self.rows]), device).unbind()
        images = to_device(self.images, device)
        return self._replace(images=images, labels=labels, learner=learner, rows=rows, learner_on_host=self.learner)


class DecodedBlock(NamedTuple):
    """Consecutive rows of a view, b of them, as a sequential pass delivers them.

    ``images`` (b, 3, S, S) uint8, in memory (b, S, S, 3); ``places`` (b,) in the view; ``valid`` (b,) bool, False: a row that failed to
    decode; ``failed`` the keys of those; ``number`` of the block in the whole pass.
    """

    images: Tensor
    places: Tensor
    valid: Tensor
    failed: list[str]
    number: int


class Request(NamedTuple):
    """What a worker is asked for: a rank's part of one step."""

    step: int
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    learner: NDArray[np.int64]
    slots: NDArray[np.int64]
    rows_of_ranks: list[int]


def load_image(data: bytes, geometry: Geometry, uniforms: Tensor | None) -> Tensor | None:
    """The pixels, or None if the bytes are no image. Only decoding may fail: an error in the geometry is a bug."""
    try:
        image = decode(data)
    except DECODE_ERRORS:
        return None
    return geometry(image, uniforms)


def stack(index: DatasetIndex, rows: NDArray[np.int64], images: list[Tensor | None], size: int) -> tuple[Tensor, Tensor, list[str]]:
    """Pixels (b, 3, S, S) of rows of the index, which of them are valid (b,), and the keys of the others.

    None is an image that failed to decode: its pixels are zero.
    """
    valid = torch.tensor([image is not None for image in images])
    empty = _black(1, size)[0]
    failed = [index.key(int(row)) for row, image in zip(rows, images, strict=True) if image is None]
    # Stacked as they lie in memory.
    pixels = torch.stack([(empty if image is None else image).permute(1, 2, 0) for image in images])
    return pixels.permute(0, 3, 1, 2), valid, failed


def _black(rows: int, size: int) -> Tensor:
    """(rows, 3, S, S), in memory as all images are."""
    return torch.zeros(rows, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)


def assemble(index: DatasetIndex, request: Request, images: list[Tensor | None], size: int) -> Batch:
    """A batch from decoded images; a row that failed (None) has learner -1."""
    pixels, valid, failed = stack(index, request.rows, images, size)
    learner = torch.from_numpy(request.learner)
    return Batch(
        images=pixels,
        labels=torch.from_numpy(request.labels),
        learner=torch.where(valid, learner, torch.full_like(learner, -1)),
        rows=torch.from_numpy(request.rows),
        slots=torch.from_numpy(request.slots),
        valid=valid,
        failed=failed,
        step=request.step,
        rows_of_ranks=request.rows_of_ranks,
    )


def dummy(step: int, size: int, rows_of_ranks: list[int]) -> Batch:
    """The batch of a rank without rows: one row that takes part in nothing."""
    one = torch.ones(1, dtype=torch.int64)
    return Batch(
        images=_black(1, size),
        labels=0 * one,
        learner=-one,
        rows=-one,
        slots=0 * one,
        valid=torch.zeros(1, dtype=torch.bool),
        failed=[],
        step=step,
        rows_of_ranks=rows_of_ranks,
    )
