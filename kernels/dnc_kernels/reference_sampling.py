"""The sampling half of the specification: row weights and draws, in plain torch on any device.

Shapes: B anchors, G references, D embedding, P positives at most. Whatever decides about a draw (distances, weights,
race keys) is computed in float64, so that a draw depends on z alone and not on how a matrix product was blocked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dnc_kernels.contract import DEFAULT_SAMPLING, Pairs, Rows, Sampling
from dnc_kernels.philox import draw_words, exponentials
from dnc_kernels.reference_columns import Columns, Exact, Windows, compared, own_columns

ANTIPODE_MIN = 1e-6  # lower clamp of 1 - d²/4: finite weights at d = 2
FLOOR_WITHIN, FLOOR_BEYOND = 1e-9, 1e-6  # the published floors, relative to the row's largest weight
BLOCK_ELEMENTS = 1 << 19  # (anchors × references) held at once; a cache holds a few such matrices


def _bar_all(negated_squares: Tensor, windows: Windows, columns: Columns) -> Tensor:
    """-inf where anchors meet another learner's columns or those of their own class, (b, G)."""
    barred = (windows.learner[:, None] != columns.learner) | (windows.classes[:, None] == columns.classes)
    return negated_squares.masked_fill_(barred, -torch.inf)


def _bar_class(negated_squares: Tensor, windows: Windows) -> Tensor:
    """-inf where anchors meet columns of their own class, (b, g) from the first column of each anchor's learner on; on a CPU."""
    length = windows.class_end - windows.class_start
    row, place = (torch.arange(int(length.max())) < length[:, None]).nonzero(as_tuple=True)
    negated_squares[row, (windows.class_start - windows.learner_start)[row] + place] = -torch.inf
    return negated_squares


def _negated_squares(anchors: Exact, columns: Exact, out: Tensor | None = None) -> Tensor:
    """-d², (b, g) float64."""
    lengths = torch.add(anchors.squares[:, None], columns.squares, out=out)
    return torch.addmm(lengths, anchors.z, columns.z.T, beta=-1.0, alpha=2.0, out=lengths)


def _log_weights(negated_squares: Tensor, dim: int, sampling: Sampling) -> Tensor:
    """log of the row weights up to a constant per row, (b, g) float64, -inf where the weight is 0 (Wu et al. 2017, eq. 4-5).

    The density of distances on the n-sphere is d^(n-2) (1 - d²/4)^((n-3)/2); the weight is its inverse.

    Args:
        negated_squares: -d² of candidates, -inf of others; overwritten.
        dim: D, which is n where `sampling` has none.
    """
    n = dim if sampling.effective_dim is None else sampling.effective_dim
    other = negated_squares == -torch.inf if sampling.mode == "reference" else None
    # threshold_ keeps what is greater, that is d up to the cutoff.
    greater = math.nextafter(-(sampling.nonzero_loss_cutoff**2), -math.inf)
    squared = torch.threshold_(negated_squares, greater, -torch.inf).mul_(-1.0).clamp_(min=sampling.cutoff**2)
    left_out = squared == torch.inf if other is not None or n <= 2 else None
    # Both logarithms see values above 0 only: masking afterwards would still have made NaN. That of inf is weight 0 where n > 2.
    tail = torch.rsub(squared, 1.0, alpha=0.25).clamp_(min=ANTIPODE_MIN).log_()
    log_weight = squared.log_().mul_(0.5 * (2.0 - n)).sub_(tail, alpha=0.5 * (n - 3.0))
    if left_out is None:
        return log_weight
    log_weight.masked_fill_(left_out, -torch.inf)
    if other is None:
        return log_weight
    weight = torch.where(left_out, FLOOR_BEYOND, _over_largest(log_weight).exp_() + FLOOR_WITHIN)
    return weight.log_().masked_fill_(other, -torch.inf)


def _over_largest(log_weight: Tensor) -> Tensor:
    """Logarithms relative to the largest of each row; a row without any stays -inf."""
    if not log_weight.shape[1]:
        return log_weight
    largest = log_weight.amax(1, keepdim=True)
    return log_weight - torch.where(largest == -torch.inf, 0.0, largest)


@torch.no_grad()
def negative_weights(anchors: Rows, references: Rows | None = None, *, sampling: Sampling = DEFAULT_SAMPLING) -> Tensor:
    """Row weights (B, G) in float64, 0 for what is never drawn; in mode "paper" relative to each row's largest.

    Only the reference has it: it needs memory proportional to B·G and serves tests and inspection.
    """
    _, exact, windows, columns = compared(anchors, references)
    squares = _bar_all(_negated_squares(exact, columns.exact), windows, columns)
    log_weight = _log_weights(squares, exact.z.shape[1], sampling)
    weight = (_over_largest(log_weight) if sampling.mode == "paper" else log_weight).exp_()
    return torch.empty_like(weight).index_copy_(1, columns.order, weight)


def _positive_slots(windows: Windows, own_column: Tensor, num_slots: int) -> Tensor:
    """The first `num_slots` columns of each anchor's class but itself, (B, num_slots) int64, -1 where there are fewer."""
    column = windows.class_start[:, None] + torch.arange(num_slots, device=own_column.device)
    column += column >= own_column[:, None]  # what comes after the anchor itself stands a slot earlier
    return column.masked_fill_(column >= windows.class_end[:, None], -1)


class Run(NamedTuple):
    """Anchors of a block that are of one learner, and its columns."""

    anchors: slice
    columns: slice


def _blocks(windows: Windows, num_columns: int) -> Iterator[tuple[Tensor | slice, list[Run] | None]]:
    """Anchors, and what to compare them with: on a CPU the columns of their learners; None: all columns.

    Elsewhere it would take a wait for the device to know where a learner ends.
    """
    num_anchors = windows.learner.shape[0]
    if windows.learner.device.type != "cpu":
        size = max(1, BLOCK_ELEMENTS // max(1, num_columns))
        yield from ((slice(start, start + size), None) for start in range(0, num_anchors, size))
        return
    learner, order = windows.learner.sort(stable=True)
    in_order = torch.equal(learner, windows.learner)  # then nothing of the anchors is copied
    ends = learner.unique_consecutive(return_counts=True)[1].cumsum(0)
    some = order[ends - 1]  # an anchor of each learner
    anchors = itertools.pairwise([0, *ends.tolist()])
    columns = zip(windows.learner_start[some].tolist(), windows.learner_end[some].tolist(), strict=True)
    runs = [Run(slice(*rows), slice(*run)) for rows, run in zip(anchors, columns, strict=True) if run[0] < run[1]]
    if not runs:
        return
    if num_anchors * _longest(runs) <= BLOCK_ELEMENTS:  # one matrix of all learners costs less than one of each
        yield slice(None) if in_order else order, runs
        return
    for rows, run in runs:
        size = max(1, BLOCK_ELEMENTS // (run.stop - run.start))
        for start in range(rows.start, rows.stop, size):
            part = slice(start, min(start + size, rows.stop))
            yield part if in_order else order[part], [Run(slice(None), run)]


def _longest(runs: list[Run]) -> int:
    return max(run.stop - run.start for _, run in runs)


def _waiting(row_ids: Tensor, num_positions: int, sampling: Sampling) -> Tensor:
    """log E of each anchor for positions 0 … num_positions-1, (b, num_positions) float64."""
    return exponentials(draw_words(row_ids, num_positions, sampling.seed, sampling.step)).log_()


def _race_keys(row_ids: Tensor, exact: Exact, windows: Windows, columns: Columns, runs: list[Run] | None, sampling: Sampling) -> Tensor:
    """Race keys of b anchors, (b, g) float64, -inf where nothing may be drawn; with runs each row begins at its learner's first column.

    The k largest of log w - log E, with E exponential, are k draws without replacement (Efraimidis and Spirakis 2006).
    """
    if runs is None:
        squares = _bar_all(_negated_squares(exact, columns.exact), windows, columns)
        waiting = _waiting(row_ids, columns.position.shape[0], sampling).index_select(1, columns.position)
        return _log_weights(squares, exact.z.shape[1], sampling).sub_(waiting)
    squares = exact.z.new_full((row_ids.shape[0], _longest(runs)), -torch.inf)
    positions = [columns.position[run] for _, run in runs]
    waiting = _waiting(row_ids, 1 + max(int(position[-1]) for position in positions), sampling)
    for (rows, run), position in zip(runs, positions, strict=True):
        length = position.shape[0]
        _negated_squares(exact.at(rows), columns.exact.at(run), out=squares[rows, :length])
        if int(position[-1]) >= length:  # else they are 0, 1, … as the columns of a learner are sorted
            waiting[rows, :length] = waiting[rows].index_select(1, position)
    squares = _bar_class(squares, windows)
    return _log_weights(squares, exact.z.shape[1], sampling).sub_(waiting[:, : squares.shape[1]])


@torch.no_grad()
def sample_pairs(anchors: Rows, references: Rows | None = None, *, sampling: Sampling = DEFAULT_SAMPLING) -> Pairs:
    """All positives of every anchor and as many distance-weighted negatives, drawn without replacement inside its learner.

    Args:
        anchors: B rows. Their row ids key the draws and exclude the anchor itself.
        references: G rows, e.g. those of all ranks; None compares the anchors with themselves. With references both need row ids.
        sampling: constants, bound and key of the draws.

    Returns:
        Padded `Pairs`, min(#positives, #candidates of non-zero weight) negatives per anchor, in the order of their draw.
        `stats`: anchors (usable, in a learner), anchors_without_positives, anchors_without_negatives (no candidate),
        negative_shortfall (negatives fewer than positives, summed), positives_over_limit (beyond `max_positives`),
        non_finite_rows and zero_rows among the anchors (in no pair).

    Raises:
        ValueError: wrong shapes, types or devices.
    """
    rows = compared(anchors, references)
    own, exact, windows, columns = rows
    num_anchors, num_references, device = own.z.shape[0], columns.order.shape[0], own.z.device
    own_column = own_columns(rows)
    found = windows.class_end - windows.class_start - (own_column < num_references).long()
    max_positives = sampling.max_positives
    if max_positives is None:
        max_positives = int(found.max()) if num_anchors else 0
    num_slots = min(max_positives, num_references)

    negatives = torch.full((num_anchors, num_slots), -1, device=device)
    candidates = torch.zeros_like(found)
    for block, runs in _blocks(windows, num_references):
        keys = _race_keys(own.row_ids[block], exact.at(block), windows.at(block), columns, runs, sampling)
        drawn = keys.topk(min(num_slots, keys.shape[1]), dim=1).indices
        negatives[block, : drawn.shape[1]] = drawn if runs is None else drawn.add_(windows.learner_start[block, None])
        candidates[block] = (keys != -torch.inf).sum(1)
    negatives.masked_fill_(torch.arange(num_slots, device=device) >= torch.minimum(found, candidates)[:, None], -1)

    slots = torch.cat([_positive_slots(windows, own_column, num_slots), negatives], dim=1)
    slots = pad(columns.order, (0, 1), value=-1)[slots]  # an empty slot, -1, takes the last
    is_positive = (torch.arange(2 * num_slots, device=device) < num_slots).expand_as(slots)
    anchor = torch.arange(num_anchors, device=device)[:, None].expand_as(slots)
    in_learner = own.learner >= 0
    rows_with = {
        "anchors": exact.usable,
        "anchors_without_positives": exact.usable & (found == 0),
        "anchors_without_negatives": exact.usable & (candidates == 0),
        "non_finite_rows": in_learner & ~(exact.squares < torch.inf),
        "zero_rows": in_learner & (exact.squares == 0),
    }
    beyond = {"negative_shortfall": found - candidates, "positives_over_limit": found - num_slots}
    stats = dict(zip(rows_with, torch.stack([*rows_with.values()]).sum(1).unbind(), strict=True))
    stats |= zip(beyond, torch.stack([*beyond.values()]).clamp_min_(0).sum(1).unbind(), strict=True)
    return Pairs(anchor.reshape(-1), slots.reshape(-1), is_positive.reshape(-1), stats)
