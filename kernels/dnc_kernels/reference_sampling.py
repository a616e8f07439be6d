"""The sampling half of the specification: row weights and draws, in plain torch on any device.

Shapes: B anchors, G references, D embedding, P positives at most. Whatever decides about a draw (distances, weights,
race keys) is computed in float64, so that a draw depends on z alone and not on how a matrix product was blocked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dnc_kernels.contract import DEFAULT_SAMPLING, Pairs, Rows, Sampling
from dnc_kernels.philox import draw_words, exponentials
from dnc_kernels.reference_columns import Columns, Compared, Exact, Windows, compared, num_positives

ANTIPODE_MIN = 1e-6  # lower clamp of 1 - d²/4: finite weights at d = 2
FLOOR_WITHIN, FLOOR_BEYOND = 1e-9, 1e-6  # the published floors, relative to the row's largest weight
BLOCK_ELEMENTS = 1 << 18  # (anchors × references) held at once; a cache holds a few such matrices
TOGETHER_ELEMENTS = 1 << 16  # up to so many, one matrix of all learners costs less than one of each


def _bar_all(negated_squares: Tensor, windows: Windows, columns: Columns) -> Tensor:
    """-inf where anchors meet another learner's columns or those of their own class, (b, G)."""
    barred = (windows.learner[:, None] != columns.learner) | (windows.classes[:, None] == columns.classes)
    return negated_squares.masked_fill_(barred, -torch.inf)


def _bar_class(negated_squares: Tensor, windows: Windows, first_column: int) -> Tensor:
    """-inf where anchors meet columns of their own class, (b, g) of one learner; on a CPU."""
    length = windows.class_end - windows.class_start
    row, place = (torch.arange(int(length.max())) < length[:, None]).nonzero(as_tuple=True)
    negated_squares[row, windows.class_start[row] + place - first_column] = -torch.inf
    return negated_squares


def _negated_squares(anchors: Exact, columns: Exact) -> Tensor:
    """-d², (b, g) float64."""
    lengths = anchors.squares[:, None] + columns.squares
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


def _positive_slots(rows: Compared, num_slots: int) -> Tensor:
    """The first `num_slots` columns of each anchor's class but itself, (B, num_slots) int64, -1 where there are fewer."""
    own, _, windows, columns = rows
    at = windows.class_start[:, None] + torch.arange(num_slots + 1, device=own.z.device)
    inside = at < windows.class_end[:, None]
    at = at.where(inside, 0)
    itself = inside & (columns.row_ids[at] == own.row_ids[:, None])
    # What comes after the anchor itself stands a slot earlier.
    after = itself.cumsum(1)[:, :num_slots] > 0
    return torch.where(after, at[:, 1:], at[:, :-1]).masked_fill_(~torch.where(after, inside[:, 1:], inside[:, :-1]), -1)


def _blocks(windows: Windows, num_columns: int) -> Iterator[tuple[Tensor | slice, slice | None]]:
    """Anchors, and the run of columns to compare them with: on a CPU those of a learner; None: all, where that is little.

    Elsewhere it would take a wait for the device to know where a learner ends.
    """
    num_anchors = windows.learner.shape[0]
    if windows.learner.device.type != "cpu" or num_anchors * num_columns <= TOGETHER_ELEMENTS:
        size = max(1, BLOCK_ELEMENTS // max(1, num_columns))
        yield from ((slice(start, start + size), None) for start in range(0, num_anchors, size))
        return
    order = windows.learner_start.argsort(stable=True)
    for rows in order.split(windows.learner[order].unique_consecutive(return_counts=True)[1].tolist()):
        run = slice(int(windows.learner_start[rows[0]]), int(windows.learner_end[rows[0]]))
        if run.start < run.stop:
            yield from ((part, run) for part in rows.split(max(1, BLOCK_ELEMENTS // (run.stop - run.start))))


def _race_keys(row_ids: Tensor, exact: Exact, windows: Windows, columns: Columns, run: slice | None, sampling: Sampling) -> Tensor:
    """Race keys of b anchors in a run of columns, (b, g) float64, -inf where nothing may be drawn.

    The k largest of log w - log E, with E exponential, are k draws without replacement (Efraimidis and Spirakis 2006).
    """
    if run is None:
        squares, position = _bar_all(_negated_squares(exact, columns.exact), windows, columns), columns.position
    else:
        squares, position = _bar_class(_negated_squares(exact, columns.exact.at(run)), windows, run.start), columns.position[run]
    width = position.shape[0]
    num_draws = int(position.max()) + 1 if position.device.type == "cpu" and width else width
    waiting = exponentials(draw_words(row_ids, num_draws, sampling.seed, sampling.step)).log_()
    if run is None or num_draws > width:  # else the positions are 0, 1, … as the columns of a learner are sorted
        waiting = waiting.index_select(1, position)
    return _log_weights(squares, exact.z.shape[1], sampling).sub_(waiting)


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
    found = num_positives(rows)
    max_positives = sampling.max_positives
    if max_positives is None:
        max_positives = int(found.max()) if num_anchors else 0
    num_slots = min(max_positives, num_references)

    negatives = torch.full((num_anchors, num_slots), -1, device=device)
    candidates = torch.zeros_like(found)
    for block, run in _blocks(windows, num_references):
        keys = _race_keys(own.row_ids[block], exact.at(block), windows.at(block), columns, run, sampling)
        drawn = keys.topk(min(num_slots, keys.shape[1]), dim=1).indices
        negatives[block, : drawn.shape[1]] = drawn if run is None else drawn.add_(run.start)
        candidates[block] = (keys != -torch.inf).sum(1)
    negatives.masked_fill_(torch.arange(num_slots, device=device) >= torch.minimum(found, candidates)[:, None], -1)

    if num_references:
        slots = torch.cat([_positive_slots(rows, num_slots), negatives], dim=1)
        slots = torch.where(slots >= 0, columns.order[slots.clamp_min(0)], -1)
    else:
        slots = negatives
    is_positive = (torch.arange(2 * num_slots, device=device) < num_slots).expand_as(slots)
    anchor = torch.arange(num_anchors, device=device)[:, None].expand_as(slots)
    in_learner = own.learner >= 0
    in_pairs = exact.usable & in_learner
    rows_with = {
        "anchors": in_pairs,
        "anchors_without_positives": in_pairs & (found == 0),
        "anchors_without_negatives": in_pairs & (candidates == 0),
        "non_finite_rows": in_learner & ~(exact.squares < torch.inf),
        "zero_rows": in_learner & (exact.squares == 0),
    }
    beyond = {"negative_shortfall": found - candidates, "positives_over_limit": found - num_slots}
    stats = dict(zip(rows_with, torch.stack([*rows_with.values()]).sum(1).unbind(), strict=True))
    stats |= zip(beyond, torch.stack([*beyond.values()]).clamp_min_(0).sum(1).unbind(), strict=True)
    return Pairs(anchor.reshape(-1), slots.reshape(-1), is_positive.reshape(-1), stats)
