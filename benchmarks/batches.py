"""A batch that no data set made, to measure what a step costs."""

from __future__ import annotations

import torch

from dnc_dist.data.loading import Batch

PER_CLASS = 4


def random_batch(rows: int, size: int) -> Batch:
    """Rows of one learner on one process, ``PER_CLASS`` of each class, ``size`` pixels wide and high."""
    row = torch.arange(rows)
    shape, numbers = (rows, size, size, 3), torch.Generator().manual_seed(0)
    return Batch(
        images=torch.randint(0, 256, shape, dtype=torch.uint8, generator=numbers).permute(0, 3, 1, 2),
        labels=row // PER_CLASS,
        learner=torch.zeros_like(row),
        rows=row,
        slots=row,
        valid=torch.ones(rows, dtype=torch.bool),
        failed=[],
        step=0,
        rows_of_ranks=[rows],
        rows_of_world=[rows],
        max_positives=PER_CLASS - 1,
    )
