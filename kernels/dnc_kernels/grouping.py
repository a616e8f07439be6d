"""Stable order of items by an integer key, without a wait for the device: which pairs belong to a row, which rows to a learner.

Shapes: n items, N groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTED_UP_TO = 8192  # items; counting n² comparisons takes one launch, a sort takes about ten
ITEMS, COMPARED, WARPS = 16, 512, 8  # tile of comparisons


@triton.jit(do_not_specialize=["num_items", "num_groups"])
def group_kernel(
    keys,  # (n,) int64
    order,  # (n,) int64
    starts,  # (N + 1,) int64
    num_items,
    num_groups,
    ITEMS: tl.constexpr,
    COMPARED: tl.constexpr,
):
    # Queries 0 … n-1 are the items, then come the groups 0 … N: both ask how many items stand before them.
    query = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    is_item = query < num_items
    key = tl.where(is_item, tl.load(keys + query, mask=is_item, other=0).to(tl.int32), query - num_items)
    tie = tl.where(is_item, query, -1)  # no item of its own key stands before the start of a group
    before = tl.zeros([ITEMS], tl.int32)
    for block in range(0, tl.cdiv(num_items, COMPARED)):
        item = block * COMPARED + tl.arange(0, COMPARED)
        other = tl.load(keys + item, mask=item < num_items, other=0).to(tl.int32)
        smaller = (other[None, :] < key[:, None]) | ((other[None, :] == key[:, None]) & (item[None, :] < tie[:, None]))
        before += tl.sum((smaller & (item < num_items)[None, :]).to(tl.int32), 1)
    tl.store(order + before, query.to(tl.int64), mask=is_item)
    tl.store(starts + query - num_items, before, mask=(query >= num_items) & (query <= num_items + num_groups))


def group(keys: Tensor, num_groups: int, *, counted_up_to: int = COUNTED_UP_TO) -> tuple[Tensor, Tensor]:
    """Order and starts: the items of group g are order[starts[g]:starts[g + 1]], in the order in which they came.

    keys (n,) int64 below `num_groups`; negative keys come first, in no group. Returns order (n,) and starts (num_groups + 1,), int64.
    """
    num_items = keys.shape[0]
    if num_items > counted_up_to:
        ordered, order = keys.int().sort(stable=True)
        return order, torch.searchsorted(ordered, torch.arange(num_groups + 1, dtype=torch.int32, device=keys.device))
    order, starts = torch.empty_like(keys), keys.new_empty(num_groups + 1)
    grid = (triton.cdiv(num_items + num_groups + 1, ITEMS),)
    group_kernel[grid](keys, order, starts, num_items, num_groups, ITEMS, COMPARED, num_warps=WARPS)
    return order, starts
