"""What is given to a division by others than our own trainer is checked on every rank, and refused on all if it is wrong on one."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnc_dist.base.errors import InputError
from dnc_dist.processes import distributed

NORM_TOLERANCE = 0.01
"""How far the length of a feature may be from 1: rows that were normalised in bfloat16 are wrong by up to 0.004."""


def check_features(features: Tensor, num_rows: int, width: int | None, state: Hashable) -> int:
    """Collective. The number of this rank's first row among those of all ranks.

    Args:
        features: (n, F) of this rank.
        num_rows: N, rows that all ranks must have together.
        width: F of the division that k-means begins at; None: any.
        state: what must be equal on all ranks.

    Raises:
        InputError: on every rank, if the features of one are of a wrong shape, not finite or not normalised, if they do not fit
            together, or if the states differ.
    """
    problem = _problem(features)
    every = distributed.gather_objects((problem, 0 if problem else len(features), None if problem else features.shape[1], state))
    for rank, (problem, *_) in enumerate(every):
        if problem:
            raise InputError(f"rank {rank}: {problem}" if len(every) > 1 else problem)
    _, rows, widths, states = zip(*every, strict=True)
    if len(set(states)) > 1:
        raise InputError(
            "the processes do not divide the same: construct every Divider with the same arguments, "
            "call divide equally often, and load the same state"
        )
    if width is not None and set(widths) != {width}:
        raise InputError(f"features have {widths[0]} columns, those of the last division {width}; give features of the same layer")
    if len(set(widths)) > 1:
        raise InputError(f"the features of the processes have {sorted(set(widths))} columns; all must have the same number")
    if sum(rows) != num_rows:
        raise InputError(f"{sum(rows)} features for {num_rows} labels; give every row once, all processes together")
    return sum(rows[: distributed.group_rank()])


def _problem(features: Tensor) -> str | None:
    """What is wrong with the features of this rank."""
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        kind = f"shape {tuple(features.shape)} and type {features.dtype}" if isinstance(features, Tensor) else type(features).__name__
        return f"features of {kind} must be a floating-point tensor (n, F), one row for each row of the training set"
    length = torch.linalg.vector_norm(features.detach().float(), dim=1).cpu()
    if not bool(length.isfinite().all()):
        row = int((~length.isfinite()).nonzero()[0])
        return f"row {row} of the features is not finite; if the training has diverged, lower its learning rate"
    # A row of zeros stays one when it is normalised.
    wrong = ((length - 1).abs() > NORM_TOLERANCE) & (length > 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        return f"row {row} of the features has length {length[row]:.4g}; normalise them: torch.nn.functional.normalize(features, dim=1)"
    return None


def check_whole(name: str, value: Any, least: int) -> int:
    """A whole number, also one of numpy or torch.

    Raises:
        InputError: it is something else, or less than ``least``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise InputError(f"{name}={value!r} must be a whole number, at least {least}")
    return number


def check_labels(labels: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
    """(N,) int64.

    Raises:
        InputError: they are no flat list of integers.
    """
    try:
        found = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    except ValueError:  # sequences of different lengths
        raise InputError("labels must be (N,) integers, one for each row of the training set") from None
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise InputError(
            f"labels of shape {found.shape} and type {found.dtype} must be (N,) integers, one for each row of the training set"
        )
    return found.astype(np.int64)


def check_learner(learner: Any, count: int, level: int) -> Tensor:
    """(count,) int64, the learner of each row, from one number or a tensor.

    Raises:
        InputError: it has another shape or type, or names a learner beyond the ``level`` that there are. The values of a tensor on
            a GPU, which would be waited for, are not looked at.
    """
    if not isinstance(learner, Tensor) or not learner.ndim:
        number = check_whole("learner", learner, 0)
        if number >= level:
            raise InputError(f"learner={number} does not exist; there are {level} now: use 0 to {level - 1}")
        return torch.full((count,), number)
    whole = not (learner.dtype == torch.bool or learner.is_floating_point() or learner.is_complex())
    if learner.shape != (count,) or not whole:
        raise InputError(
            f"learner of shape {tuple(learner.shape)} and type {learner.dtype} must be one number, or {count} integers, one for each row"
        )
    wrong = learner[(learner < -1) | (learner >= level)] if learner.device.type == "cpu" else learner[:0]
    if len(wrong):
        raise InputError(f"learner={int(wrong[0])} does not exist; there are {level} now: use 0 to {level - 1}, or -1 for a row left out")
    return learner.long()
