"""Who can be a pair with whom, in the plain torch of the specification.

Shapes: B anchors, G references, D embedding. References stand in canonical order, by (learner, label, row id): the rows of a learner
are one run of columns, those of a class one inside it. Lengths and products are computed in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dnc_kernels.contract import CheckedRows, Rows, anchors_and_references

NOBODY, NO_PAIRS = torch.iinfo(torch.int64).max, -1  # learner and class of references and of anchors that can be in no pair


class Exact(NamedTuple):
    """Rows in float64: z (n, D), its squared lengths (n,), and which rows can be in a pair (n,): in a learner, finite and not zero."""

    z: Tensor
    squares: Tensor
    usable: Tensor

    def at(self, rows: Tensor | slice) -> Exact:
        """Some of the rows."""
        return Exact(self.z[rows], self.squares[rows], self.usable[rows])


class Columns(NamedTuple):
    """References in canonical order, (G,) each; those that can be in no pair come last, with learner and class `NOBODY`."""

    exact: Exact
    learner: Tensor
    classes: Tensor  # a number for each (learner, label), ascending
    row_ids: Tensor
    order: Tensor  # their places among the references as given
    position: Tensor  # p of the draw's counter: the place among all rows of the learner


class Windows(NamedTuple):
    """Where an anchor's learner and its class lie among the columns, (B,) each; both are empty for an anchor that can be in no pair."""

    learner: Tensor
    classes: Tensor
    learner_start: Tensor
    learner_end: Tensor
    class_start: Tensor
    class_end: Tensor

    def at(self, rows: Tensor | slice) -> Windows:
        """Those of some anchors."""
        return Windows(*(column[rows] for column in self))


class Compared(NamedTuple):
    """Anchors and what they are compared with."""

    own: CheckedRows
    exact: Exact
    windows: Windows
    columns: Columns


def _exact(rows: CheckedRows) -> Exact:
    z = rows.z.detach().double()
    squares = torch.linalg.vector_norm(z, dim=1).square()
    return Exact(z, squares, (squares > 0) & (squares < torch.inf) & (rows.learner >= 0))


def _rank(column: Tensor) -> Tensor:
    """(n,) how many entries are smaller."""
    return torch.searchsorted(column.sort().values, column.contiguous())


def _class_numbers(learner: Tensor, labels: Tensor) -> Tensor:
    """(n,) equal for rows of one learner and label, and ascending in (learner, label)."""
    return _rank(learner) * labels.shape[0] + _rank(labels)


def _in_canonical_order(references: CheckedRows, exact: Exact, classes: Tensor) -> Columns:
    order = references.row_ids.argsort(stable=True)
    order = order[classes[order].argsort(stable=True)]
    learner = references.learner[order]
    position = torch.arange(learner.shape[0], device=learner.device) - torch.searchsorted(learner, learner)
    left_out, last = (~exact.usable)[order].byte().sort(stable=True)
    order, position = order[last], position[last]
    learner, classes = (column[order].masked_fill_(left_out.bool(), NOBODY) for column in (references.learner, classes))
    return Columns(exact.at(order), learner, classes, references.row_ids[order], order, position)


def _windows(anchors: CheckedRows, exact: Exact, classes: Tensor, columns: Columns) -> Windows:
    left_out = ~exact.usable
    learner, classes = (column.masked_fill(left_out, NO_PAIRS) for column in (anchors.learner, classes))
    runs = (
        torch.searchsorted(column, wanted, right=right)
        for column, wanted in ((columns.learner, learner), (columns.classes, classes))
        for right in (False, True)
    )
    return Windows(learner, classes, *runs)


def compared(anchors: Rows, references: Rows | None) -> Compared:
    """Checked anchors, and the references, or without them the anchors, in canonical order.

    Raises:
        ValueError: wrong shapes, types or devices.
    """
    own, others = anchors_and_references(anchors, references)
    exact = _exact(own)
    if references is None:
        classes = ref_classes = _class_numbers(own.learner, own.labels)
        columns = _in_canonical_order(own, exact, classes)
    else:
        both = _class_numbers(torch.cat([own.learner, others.learner]), torch.cat([own.labels, others.labels]))
        classes, ref_classes = both.split([own.z.shape[0], others.z.shape[0]])
        columns = _in_canonical_order(others, _exact(others), ref_classes)
    return Compared(own, exact, _windows(own, exact, classes, columns), columns)


def own_columns(rows: Compared) -> Tensor:
    """(B,) the column of each anchor itself; G, which is behind all columns, where it is not among them."""
    own, _, windows, columns = rows
    num_columns = columns.order.shape[0]
    if not num_columns:
        return torch.zeros_like(own.row_ids)
    ids, place = columns.row_ids.sort(stable=True)
    found = torch.searchsorted(ids, own.row_ids.contiguous()).clamp_max_(num_columns - 1)
    column = place[found]
    itself = (ids[found] == own.row_ids) & (columns.classes[column] == windows.classes)
    return column.masked_fill_(~itself, num_columns)
