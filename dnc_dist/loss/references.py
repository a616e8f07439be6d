"""The rows that a pairwise loss compares its anchors with."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class References(NamedTuple):
    """Gathered rows of a learner's ranks: z (G, D) in their learner's subspace, normalised; labels, learner, row_ids (G,) integers."""

    z: Tensor
    labels: Tensor
    learner: Tensor
    row_ids: Tensor
