"""What is given to a division by others than our own trainer is checked on every rank, and refused on all if it is wrong on one."""

from __future__ import annotations

from collections.abc import Hashable

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
