"""The value objects of the kernel contract and the input checks that every implementation shares.

Shapes: B anchors, G references, D embedding, K learners, C classes, P positives at most. Checks of values (not of
shapes, types and devices) read the data, so they run on CPU tensors only: on a GPU they would stall the stream.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MODES = ("paper", "reference")
INTEGERS = (torch.int64, torch.int32, torch.int16)


class Pairs(NamedTuple):
    """Sampled pairs as flat lists of equal length, compact or padded; a pair that is listed twice counts twice.

    `anchor` (n,) indexes the anchors, `other` (n,) the references (-1 = an empty slot, ignored everywhere),
    `positive` (n,) bool. `sample_pairs` pads: per anchor P slots for positives, then min(P, G) for negatives, so its
    shapes depend on B, G and P alone. `stats` holds its counts as 0-d int64 tensors, or None for a list made elsewhere.
    """

    anchor: Tensor
    other: Tensor
    positive: Tensor
    stats: dict[str, Tensor] | None = None


class MarginLossOutput(NamedTuple):
    """Sums and counts, so that ranks and learners add up; the loss is loss_sum / max(1, num_active).

    `loss_sum` () and `learner_loss_sum` (K,) carry the gradient; `num_active` () and `learner_num_active` (K,) int64
    count the pairs with a non-zero loss. Every entry of `stats` is a detached 0-d sum or count: ranks add them, too.
    """

    loss_sum: Tensor
    num_active: Tensor
    learner_loss_sum: Tensor
    learner_num_active: Tensor
    stats: dict[str, Tensor]


class Rows(NamedTuple):
    """Rows with everything that decides about pairs: z (n, D), labels, learner and row_ids (n,) int64."""

    z: Tensor
    labels: Tensor
    learner: Tensor
    row_ids: Tensor


def check_matrix(name: str, value: Tensor, *, width: int | None = None, device: torch.device | None = None) -> None:
    """Raise ValueError unless `value` is a two-dimensional floating-point tensor of that width on that device."""
    if value.ndim != 2 or not value.is_floating_point():
        raise ValueError(f"{name} must be a floating-point matrix (rows, width); got shape {tuple(value.shape)}, {value.dtype}")
    if width is not None and value.shape[1] != width:
        raise ValueError(f"{name} must be {width} wide; got shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, the other tensors are on {device}")


def integer_column(name: str, value: Tensor, like: Tensor) -> Tensor:
    """`value` as int64; ValueError unless it has one integer per row of `like`, on the same device."""
    if value.shape != (like.shape[0],) or value.dtype not in INTEGERS:
        raise ValueError(f"{name} must hold {like.shape[0]} integers, one per row; got shape {tuple(value.shape)}, {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, its rows are on {like.device}")
    return value.long()


def check_below(name: str, value: Tensor, limit: int, allowed: str, *, lowest: int | None = None) -> None:
    """On CPU: ValueError if an entry is `limit` or more or below `lowest`. Elsewhere nothing, as reading it would wait for the device.

    Nor under torch.compile, which could not go on past a value.
    """
    if value.device.type != "cpu" or not value.numel() or torch.compiler.is_compiling():
        return
    smallest, largest = int(value.min()), int(value.max())
    for worst, wrong in ((largest, largest >= limit), (smallest, lowest is not None and smallest < lowest)):
        if wrong:
            raise ValueError(f"{name} contains {worst}; allowed are {allowed}")


def anchors_and_references(
    z: Tensor,
    labels: Tensor,
    learner: Tensor | None,
    row_ids: Tensor | None,
    ref_z: Tensor | None,
    ref_labels: Tensor | None,
    ref_learner: Tensor | None,
    ref_row_ids: Tensor | None,
) -> tuple[Rows, Rows]:
    """The checked anchors and references; without `ref_z` the anchors are their own references.

    Raises:
        ValueError: wrong shape, type or device, or references without the columns that say who is who.
    """
    check_matrix("z", z)
    anchors = Rows(
        z,
        integer_column("labels", labels, z),
        z.new_zeros(z.shape[0], dtype=torch.int64) if learner is None else integer_column("learner", learner, z),
        torch.arange(z.shape[0], device=z.device) if row_ids is None else integer_column("row_ids", row_ids, z),
    )
    if ref_z is None:
        if any(value is not None for value in (ref_labels, ref_learner, ref_row_ids)):
            raise ValueError("ref_labels, ref_learner and ref_row_ids describe the rows of ref_z, which is missing")
        return anchors, anchors
    check_matrix("ref_z", ref_z, width=z.shape[1], device=z.device)
    if ref_labels is None or ref_row_ids is None or row_ids is None:
        raise ValueError("ref_z needs ref_labels, ref_row_ids and row_ids: an anchor finds itself among the references by its row id")
    if (learner is None) != (ref_learner is None):
        raise ValueError("learner and ref_learner must be given together")
    return anchors, Rows(
        ref_z,
        integer_column("ref_labels", ref_labels, ref_z),
        z.new_zeros(ref_z.shape[0], dtype=torch.int64) if ref_learner is None else integer_column("ref_learner", ref_learner, ref_z),
        integer_column("ref_row_ids", ref_row_ids, ref_z),
    )


def check_sampling(cutoff: float, nonzero_loss_cutoff: float, mode: str, effective_dim: float | None, max_positives: int | None) -> None:
    """Raise ValueError for constants of the sampling outside their range."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}; allowed are {', '.join(MODES)}")
    if not 0.0 < cutoff < 2.0:
        raise ValueError(f"cutoff={cutoff}; it must lie between 0 and 2, the largest distance of unit vectors")
    if not nonzero_loss_cutoff > cutoff:
        raise ValueError(f"nonzero_loss_cutoff={nonzero_loss_cutoff}; it must lie above cutoff={cutoff}")
    if effective_dim is not None and effective_dim < 1:
        raise ValueError(f"effective_dim={effective_dim}; it must be 1 or more (None: the width of z)")
    if max_positives is not None and max_positives < 0:
        raise ValueError(f"max_positives={max_positives}; it must be 0 or more (None: counted, which waits for the device)")
