"""The rows of other ranks that a pairwise loss compares its anchors with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class References(NamedTuple):
    """The gathered rows of the ranks that share a learner; no gradient flows through them.

    z (G, D) in their learner's subspace, normalised; labels, learner, row_ids (G,) integers. The rows of this rank begin at
    ``start``. ``gather`` is a collective: it brings the same rows (b, ...) of all these ranks together, as these were.
    """

    z: Tensor
    labels: Tensor
    learner: Tensor
    row_ids: Tensor
    start: int
    gather: Callable[[Tensor], Tensor]
