"""A batch that no data set made, to measure what a step costs."""

from __future__ import annotations

import torch

from dnc_dist.data.loading import Batch
from dnc_dist.processes import distributed

PER_CLASS = 4


def random_batch(rows: int, size: int, *, per_class: int = PER_CLASS, classes: int | None = None) -> Batch:
    """This rank's rows of a batch of one learner that has as many on every rank.

    Args:
        rows: of each rank.
        size: pixels, wide and high.
        per_class: rows of each class.
        classes: how many there are, which come in turn; None: as many as are needed.
    """
    rank, world = distributed.rank(), distributed.world_size()
    row = torch.arange(rank * rows, (rank + 1) * rows)
    label = row // per_class
    shape, numbers = (rows, size, size, 3), torch.Generator().manual_seed(rank)
    return Batch(
        images=torch.randint(0, 256, shape, dtype=torch.uint8, generator=numbers).permute(0, 3, 1, 2),
        labels=label if classes is None else label % classes,
        learner=torch.zeros_like(row),
        rows=row,
        slots=row,
        valid=torch.ones(rows, dtype=torch.bool),
        failed=[],
        step=0,
        rows_of_ranks=[rows] * world,
        rows_of_world=[rows] * world,
        max_positives=per_class - 1,
    )
