"""The canonical order of rows: by learner, then label, then row id. Tiles, positions and runs are counted in it.

In this order the rows of a learner are one contiguous *segment*, and the rows of a class in it are one contiguous *run*.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTED_ROWS = 4096  # up to here every row counts the rows before it, in one launch; beyond, three stable sorts
TILE_ROWS, TILE_OTHERS = 16, 256


class Order(NamedTuple):
    """Rows in canonical order, all (n,) int64: `order[p]` is the row at place p, the columns are those of that row."""

    order: Tensor
    labels: Tensor
    learner: Tensor
    row_ids: Tensor


@triton.jit(do_not_specialize=["n"])
def _rank_kernel(
    labels, learner, row_ids, order, sorted_labels, sorted_learner, sorted_row_ids, n, ROWS: tl.constexpr, OTHERS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    own_label = tl.load(labels + row, mask=inside, other=0)
    own_learner = tl.load(learner + row, mask=inside, other=0)
    own_id = tl.load(row_ids + row, mask=inside, other=0)
    rank = tl.zeros((ROWS,), tl.int32)
    for start in range(0, n, OTHERS):
        other = start + tl.arange(0, OTHERS)
        counted = other < n
        label = tl.load(labels + other, mask=counted, other=0)[None, :]
        of_learner = tl.load(learner + other, mask=counted, other=0)[None, :]
        row_id = tl.load(row_ids + other, mask=counted, other=0)[None, :]
        # Equal row ids keep the order in which they came, as a stable sort does.
        by_id = (row_id < own_id[:, None]) | ((row_id == own_id[:, None]) & (other[None, :] < row[:, None]))
        by_label = (label < own_label[:, None]) | ((label == own_label[:, None]) & by_id)
        before = (of_learner < own_learner[:, None]) | ((of_learner == own_learner[:, None]) & by_label)
        rank += tl.sum((before & counted[None, :]).to(tl.int32), 1)
    tl.store(order + rank, row.to(tl.int64), mask=inside)
    tl.store(sorted_labels + rank, own_label, mask=inside)
    tl.store(sorted_learner + rank, own_learner, mask=inside)
    tl.store(sorted_row_ids + rank, own_id, mask=inside)


def canonical_order(labels: Tensor, learner: Tensor, row_ids: Tensor) -> Order:
    """Rows sorted by (learner, label, row id), ties in the order they came; arguments and results (n,) int64."""
    n = labels.shape[0]
    if n > COUNTED_ROWS:
        order = row_ids.argsort(stable=True)
        order = order[labels[order].argsort(stable=True)]
        order = order[learner[order].argsort(stable=True)]
        return Order(order, labels[order], learner[order], row_ids[order])
    result = Order(*(torch.empty(n, dtype=torch.int64, device=labels.device) for _ in Order._fields))
    if n:
        grid = (triton.cdiv(n, TILE_ROWS),)
        _rank_kernel[grid](
            labels.contiguous(), learner.contiguous(), row_ids.contiguous(), *result, n, ROWS=TILE_ROWS, OTHERS=TILE_OTHERS, num_warps=8
        )
    return result
