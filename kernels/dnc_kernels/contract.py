"""The value objects of the kernel contract and the input checks that every implementation shares.

Shapes: B anchors, G references, D embedding, K learners, C classes, P positives at most. Checks of values (not of
shapes, types and devices) read the data, so they run on CPU tensors only: on a GPU they would stall the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MODES = ("paper", "reference")
MARGIN = 0.2  # half-width of the band around beta in which pairs are active
INTEGERS = (torch.int64, torch.int32, torch.int16)


class Rows(NamedTuple):
    """Rows that are compared, as anchors or as references.

    `z` (n, D) is L2-normalised. `labels`, `learner` and `row_ids` are (n,) integers. `learner` -1 is in no pair; None puts all
    rows in learner 0. `row_ids` name the rows across ranks; None names them 0 … n-1.
    """

    z: Tensor
    labels: Tensor
    learner: Tensor | None = None
    row_ids: Tensor | None = None


class CheckedRows(NamedTuple):
    """`Rows` after the checks: no column is missing, integers are int64."""

    z: Tensor
    labels: Tensor
    learner: Tensor
    row_ids: Tensor


@dataclass(frozen=True)
class Sampling:
    """How the negatives of an anchor are drawn; `kernels/README.md` has the mathematics.

    Attributes:
        cutoff: distances below are weighted as this one.
        nonzero_loss_cutoff: nothing beyond is drawn (mode "paper"), or with the small published floor (mode "reference").
        mode: "paper" or "reference", the weights of the paper or those of the published code.
        effective_dim: n of the density of distances, None = D.
        max_positives: upper bound P of an anchor's positives; None counts them (on a GPU the one wait for the device).
        seed, step: key of the draws, int or 0-d int64 tensor; see `dnc_kernels.philox`.

    Raises:
        ValueError: a constant outside its range.
    """

    cutoff: float = 0.5
    nonzero_loss_cutoff: float = 1.4
    mode: str = "paper"
    effective_dim: float | None = None
    max_positives: int | None = None
    seed: Tensor | int = 0
    step: Tensor | int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}; allowed are {', '.join(MODES)}")
        if not 0.0 < self.cutoff < 2.0:
            raise ValueError(f"cutoff={self.cutoff}; it must lie between 0 and 2, the largest distance of unit vectors")
        if not self.nonzero_loss_cutoff > self.cutoff:
            raise ValueError(f"nonzero_loss_cutoff={self.nonzero_loss_cutoff}; it must lie above cutoff={self.cutoff}")
        if self.effective_dim is not None and self.effective_dim < 1:
            raise ValueError(f"effective_dim={self.effective_dim}; it must be 1 or more (None: the width of z)")
        if self.max_positives is not None and self.max_positives < 0:
            raise ValueError(f"max_positives={self.max_positives}; it must be 0 or more (None: counted, which waits for the device)")


DEFAULT_SAMPLING = Sampling()


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
    smallest, largest = (int(extreme) for extreme in value.aminmax())
    for worst, wrong in ((largest, largest >= limit), (smallest, lowest is not None and smallest < lowest)):
        if wrong:
            raise ValueError(f"{name} contains {worst}; allowed are {allowed}")


def _checked_rows(rows: Rows, prefix: str = "") -> CheckedRows:
    z, labels, learner, row_ids = rows
    return CheckedRows(
        z,
        integer_column(f"{prefix}labels", labels, z),
        z.new_zeros(z.shape[0], dtype=torch.int64) if learner is None else integer_column(f"{prefix}learner", learner, z),
        torch.arange(z.shape[0], device=z.device) if row_ids is None else integer_column(f"{prefix}row_ids", row_ids, z),
    )


def anchors_and_references(anchors: Rows, references: Rows | None) -> tuple[CheckedRows, CheckedRows]:
    """The checked anchors and references; without `references` the anchors are compared with themselves.

    Raises:
        ValueError: wrong shape, type or device, or references without the columns that say who is who.
    """
    check_matrix("z", anchors.z)
    checked = _checked_rows(anchors)
    if references is None:
        return checked, checked
    check_matrix("references.z", references.z, width=anchors.z.shape[1], device=anchors.z.device)
    if anchors.row_ids is None or references.row_ids is None:
        raise ValueError("anchors and references need row_ids: an anchor finds itself among the references by its row id")
    if (anchors.learner is None) != (references.learner is None):
        raise ValueError("anchors and references must both have a learner, or neither")
    return checked, _checked_rows(references, "references.")


def check_no_references(references: Rows | None) -> None:
    """Raise ValueError where masks come together with references."""
    if references is not None:
        raise ValueError("masks cannot be combined with references: project the embeddings first, then gather them as references")
