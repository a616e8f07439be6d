"""Losses of drawn pairs: sums over a few pairs of each anchor instead of all."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

import dnc_kernels
from dnc_dist.loss.base import StepRows
from dnc_dist.loss.pairwise import LearnerSums, References, ReferencesLoss


class DrawnPairsLoss(ReferencesLoss):
    """Write ``draw``, ``on_pairs``, and ``draw_and_sum`` for ranks that are alone, where both may be one kernel.

    The drawn pairs travel between ranks instead of gradients of references: 4 bytes for each of an anchor's slots against 4 D
    bytes for each reference.
    """

    @abstractmethod
    def draw(self, rows: StepRows, references: References) -> dnc_kernels.Pairs:
        """Pairs of the rows with references, in as many slots for each row, positives and negatives in the same ones."""

    @abstractmethod
    def on_pairs(
        self, anchors: References, pairs: dnc_kernels.Pairs, ref_z: Tensor, num_learners: int, *, learn: bool
    ) -> dnc_kernels.MarginLossOutput:
        """Sums per learner over given pairs. With ``learn``, the loss's own parameters get their gradient."""

    @abstractmethod
    def draw_and_sum(self, rows: StepRows) -> dnc_kernels.MarginLossOutput:
        """What ``on_pairs`` gives for what ``draw`` draws, where the rows are the only references."""

    def learner_sums(self, rows: StepRows) -> LearnerSums:
        """Collective. The sums of this rank's anchors; every row gets its gradient as a reference of other ranks' anchors, too."""
        if rows.alone and not self.remembers(rows):
            return _sums(self.draw_and_sum(rows))
        references = self.references(rows, "none")
        if references.max_positives is None:  # counted where all ranks count the same
            references = references._replace(max_positives=_most_positives(references))
        pairs = self.draw(rows, references)
        anchors = References(rows.z, rows.labels, rows.learner, rows.row_ids, references.max_positives)
        out = _sums(self.on_pairs(anchors, pairs, references.z, rows.num_learners, learn=True))
        if not len(pairs.other):  # no class has two rows: equal on all ranks
            return out
        drawn_here = _drawn_here(rows, pairs)
        as_references = self.on_pairs(references, drawn_here, rows.z, rows.num_learners, learn=False).learner_loss_sum
        # Adds nothing to the value, which counts a pair once, with its anchor.
        return out._replace(sums=out.sums + as_references - as_references.detach())


def _most_positives(references: References) -> int:
    """An upper bound of the positives of an anchor, which is a reference itself. Waits for the device."""
    counts = references.labels[references.learner >= 0].unique(return_counts=True)[1]
    return int(counts.max()) - 1 if len(counts) else 0


def _sums(out: dnc_kernels.MarginLossOutput) -> LearnerSums:
    return LearnerSums(out.learner_loss_sum, out.learner_num_active, out.stats | {"active_pairs": out.learner_num_active.sum()})


def _drawn_here(rows: StepRows, pairs: dnc_kernels.Pairs) -> dnc_kernels.Pairs:
    """Collective. The pairs of all ranks' anchors, as places among the references, with this rank's rows as the other ones."""
    mine = len(rows.labels)
    drawn = pairs.other.view(mine, -1)
    slots = drawn.shape[1]
    other = rows.gather(drawn.int()).flatten().long() - rows.start
    here = (other >= 0) & (other < mine)
    anchors = len(other) // slots
    positive = pairs.positive.view(mine, -1)[:1].expand(anchors, slots).flatten()
    anchor = torch.arange(anchors, device=drawn.device).repeat_interleave(slots)
    if drawn.device.type == "cpu":
        return dnc_kernels.Pairs(anchor[here], other[here], positive[here])
    # The number of pairs must not depend on values, or the host waits for the device.
    return dnc_kernels.Pairs(anchor, torch.where(here, other, -1), positive)
