"""The sampling half of the specification: relations, row weights and draws, in plain torch on any device.

Shapes: B anchors, G references, D embedding, P positives at most. Whatever decides about a draw (distances, weights,
race keys) is computed in float64, so that a draw depends on z alone and not on how a matrix product was blocked.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dnc_kernels.contract import DEFAULT_SAMPLING, CheckedRows, Pairs, Rows, Sampling, anchors_and_references
from dnc_kernels.philox import draw_words, exponentials

ANTIPODE_MIN = 1e-6  # lower clamp of 1 - d²/4: finite weights at d = 2
FLOOR_WITHIN, FLOOR_BEYOND = 1e-9, 1e-6  # the published floors, relative to the row's largest weight
BLOCK_ELEMENTS = 1 << 21  # (anchors × references) held at once


def _row_blocks(num_rows: int, width: int) -> Iterator[slice]:
    size = max(1, BLOCK_ELEMENTS // max(1, width))
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def _usable(rows: CheckedRows) -> tuple[Tensor, Tensor]:
    """(n,) bool each: finite rows, and finite rows that are not zero (only those can be in a pair)."""
    finite = torch.isfinite(rows.z).all(1)
    return finite, finite & (rows.z != 0).any(1)


def _canonical_order(references: CheckedRows) -> tuple[CheckedRows, Tensor, Tensor]:
    """References sorted by (learner, label, row id), the permutation (G,), and each one's position within its learner."""
    order = references.row_ids.argsort(stable=True)
    order = order[references.labels[order].argsort(stable=True)]
    order = order[references.learner[order].argsort(stable=True)]
    learner = references.learner[order]
    start = torch.searchsorted(learner, learner)  # of the learner's run
    ordered = CheckedRows(references.z[order], references.labels[order], learner, references.row_ids[order])
    return ordered, order, torch.arange(learner.shape[0], device=learner.device) - start


def _relations(anchors: CheckedRows, references: CheckedRows, usable: Tensor, ref_usable: Tensor) -> tuple[Tensor, Tensor]:
    """(b, G) bool: is it a positive, is it a row of another class; both within one learner, the anchor itself excluded."""
    together = (anchors.learner[:, None] == references.learner) & (anchors.learner >= 0)[:, None]
    together &= usable[:, None] & ref_usable
    together &= anchors.row_ids[:, None] != references.row_ids
    same = anchors.labels[:, None] == references.labels
    return together & same, together & ~same


def _log_weights(z: Tensor, ref_z: Tensor, different: Tensor, sampling: Sampling) -> Tensor:
    """log of the row weights up to a constant per row, (b, G) float64, -inf where the weight is 0 (Wu et al. 2017, eq. 4-5).

    The density of distances on the n-sphere is d^(n-2) (1 - d²/4)^((n-3)/2); the weight is its inverse.
    """
    n = z.shape[1] if sampling.effective_dim is None else sampling.effective_dim
    z, ref_z = z.detach().double(), ref_z.detach().double()
    squared = torch.addmm(z.square().sum(1)[:, None] + ref_z.square().sum(1), z, ref_z.T, alpha=-2.0).clamp_(min=sampling.cutoff**2)
    beyond = squared > sampling.nonzero_loss_cutoff**2
    # Both logarithms see clamped values only: masking afterwards would still have made inf and NaN.
    log_weight = (0.5 * (2.0 - n)) * squared.log() - (0.5 * (n - 3.0)) * (1.0 - 0.25 * squared).clamp_(min=ANTIPODE_MIN).log_()
    candidate = different & ~beyond
    log_weight.masked_fill_(~candidate, -torch.inf)
    if sampling.mode == "paper":
        return log_weight
    largest = log_weight.amax(1, keepdim=True) if log_weight.shape[1] else log_weight
    weight = torch.where(candidate, (log_weight - torch.where(largest == -torch.inf, 0.0, largest)).exp() + FLOOR_WITHIN, FLOOR_BEYOND)
    return weight.log_().masked_fill_(~different, -torch.inf)


def negative_weights(anchors: Rows, references: Rows | None = None, *, sampling: Sampling = DEFAULT_SAMPLING) -> Tensor:
    """Weights with which `sample_pairs` draws the negatives of each anchor: (B, G) float64, the row's largest is 1, 0 = never drawn.

    Only the reference has it: it needs memory proportional to B·G and serves tests and inspection.
    """
    own, others = anchors_and_references(anchors, references)
    _, different = _relations(own, others, _usable(own)[1], _usable(others)[1])
    log_weight = _log_weights(own.z, others.z, different, sampling)
    if sampling.mode == "reference" or not log_weight.shape[1]:
        return log_weight.exp_()
    largest = log_weight.amax(1, keepdim=True)
    return (log_weight - torch.where(largest == -torch.inf, 0.0, largest)).exp_()


def _positive_slots(positive: Tensor, num_slots: int) -> Tensor:
    """The first `num_slots` true columns of each row of (b, G), (b, num_slots) int64, -1 where there are fewer."""
    rank = positive.cumsum(1) - 1
    target = torch.where(positive & (rank < num_slots), rank, num_slots)  # the last column collects what is not wanted
    columns = torch.arange(positive.shape[1], device=positive.device).expand_as(target)
    slots = torch.full((positive.shape[0], num_slots + 1), -1, device=positive.device)
    return slots.scatter_(1, target, columns)[:, :num_slots]


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
    own, others = anchors_and_references(anchors, references)
    num_anchors, num_references, device = own.z.shape[0], others.z.shape[0], own.z.device
    finite, usable = _usable(own)
    others, order, position = _canonical_order(others)
    _, ref_usable = _usable(others)

    def block_relations(rows: slice) -> tuple[CheckedRows, Tensor, Tensor]:
        block = CheckedRows(*(column[rows] for column in own))
        return block, *_relations(block, others, usable[rows], ref_usable)

    blocks = list(_row_blocks(num_anchors, num_references))
    max_positives = sampling.max_positives
    if max_positives is None:
        counts = [block_relations(rows)[1].sum(1) for rows in blocks]
        max_positives = int(torch.cat(counts).max()) if counts else 0
    num_positive_slots = min(max_positives, num_references)
    num_draws = int(position.max()) + 1 if device.type == "cpu" and num_references else num_references

    drawn, counted = [], []
    for rows in blocks:
        block, positive, different = block_relations(rows)
        key = _log_weights(block.z, others.z, different, sampling)
        num_positives, num_candidates = positive.sum(1), (key != -torch.inf).sum(1)
        # Exponential race: the k largest of log w - log E are k draws without replacement (Efraimidis and Spirakis 2006).
        key -= exponentials(draw_words(block.row_ids, num_draws, sampling.seed, sampling.step)).log_().index_select(1, position)
        negatives = key.topk(num_positive_slots, dim=1).indices
        wanted = torch.minimum(num_positives, num_candidates)[:, None]
        negatives.masked_fill_(torch.arange(num_positive_slots, device=device) >= wanted, -1)
        drawn.append(torch.cat([_positive_slots(positive, num_positive_slots), negatives], dim=1))
        counted.append(torch.stack([num_positives, num_candidates], dim=1))

    slots = torch.cat(drawn) if drawn else torch.empty(0, 2 * num_positive_slots, dtype=torch.int64, device=device)
    found = torch.cat(counted) if counted else torch.empty(0, 2, dtype=torch.int64, device=device)
    if num_references:
        slots = torch.where(slots >= 0, order[slots.clamp_min(0)], -1)
    is_positive = (torch.arange(2 * num_positive_slots, device=device) < num_positive_slots).expand_as(slots)
    anchor = torch.arange(num_anchors, device=device)[:, None].expand_as(slots)
    taking_part = usable & (own.learner >= 0)
    stats = {
        "anchors": taking_part.sum(),
        "anchors_without_positives": (taking_part & (found[:, 0] == 0)).sum(),
        "anchors_without_negatives": (taking_part & (found[:, 1] == 0)).sum(),
        "negative_shortfall": (found[:, 0] - found[:, 1]).clamp_min(0).sum(),
        "positives_over_limit": (found[:, 0] - num_positive_slots).clamp_min(0).sum(),
        "non_finite_rows": (~finite & (own.learner >= 0)).sum(),
        "zero_rows": (finite & ~usable & (own.learner >= 0)).sum(),
    }
    return Pairs(anchor.reshape(-1), slots.reshape(-1), is_positive.reshape(-1), stats)
