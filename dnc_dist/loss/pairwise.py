"""Losses of pairs: every rank compares its own rows, the anchors, with the rows of all ranks, the references.

A learner's loss is Σ over ranks of its sums, divided by Σ over ranks of its counts (or 1). Rank r returns
W/m * Σ_a s[r,a] / max(1, N_a) over the m learners of the step: the factor W undoes the engine's averaging of gradients.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from dnc_dist.loss.base import Loss, StepRows
from dnc_dist.loss.memory import Memory
from dnc_dist.processes import distributed


class References(NamedTuple):
    """The rows that anchors are compared with, G of them: those of all ranks of the group in rank order, then added ones.

    z (G, D), projected and normalised; labels, learner, row_ids (G,) int64. ``max_positives``: an upper bound of the positives that
    an anchor has among them, equal on all ranks; None: nobody has counted them.
    """

    z: Tensor
    labels: Tensor
    learner: Tensor
    row_ids: Tensor
    max_positives: int | None

    def extended(self, z: Tensor, labels: Tensor, learner: Tensor, row_ids: Tensor) -> References:
        """These and further rows, equal on all ranks, which take no gradient and are anchors of no rank."""
        return References(
            torch.cat([self.z, z.detach().to(self.z.dtype)]),
            torch.cat([self.labels, labels]),
            torch.cat([self.learner, learner]),
            torch.cat([self.row_ids, row_ids]),
            max_positives=None,
        )


class PairMatrix(NamedTuple):
    """b anchors against G references.

    ``cosine`` (b, G); ``positive``, ``negative`` (b, G) bool: pairs of one learner with the same and with different labels, without
    a row and itself; ``labels`` (b,), ``reference_labels`` (G,); ``max_positives`` an upper bound of the positives in a row, or None.
    """

    cosine: Tensor
    positive: Tensor
    negative: Tensor
    labels: Tensor
    reference_labels: Tensor
    max_positives: int | None = None

    def positives(self) -> tuple[Tensor, Tensor]:
        """The cosines of each anchor with its P positives at most, (b, P), and which of these exist, (b, P) bool.

        Waits for the device if nobody has counted the positives.
        """
        most = int(self.positive.sum(1).max()) if self.max_positives is None else min(self.max_positives, self.positive.shape[1])
        exists, at = self.positive.int().topk(most, dim=1)
        return self.cosine.gather(1, at), exists.bool()


class LearnerSums(NamedTuple):
    """What this rank's anchors add to each learner: sums (K,) with gradient, counts (K,); statistics () that are summed over ranks."""

    sums: Tensor
    counts: Tensor
    stats: dict[str, Tensor]


class ReferencesLoss(Loss):
    """Base of losses of pairs: what anchors are compared with, and the loss of a step from the sums of this rank's anchors."""

    class Options(Loss.Options):
        """Options of all losses of pairs."""

        memory: int = Field(0, ge=0)
        """Past embeddings that are kept as further references (cross-batch memory), at least a batch of them; 0: none."""
        memory_from: int = Field(0, ge=0)
        """First step that keeps embeddings and compares with kept ones: they are of use once the network changes slowly."""

        def conflicts(self, cfg: Any) -> Iterator[str]:
            if 0 < self.memory < (rows := cfg.schedule.batch_size):
                yield f"loss.memory={self.memory} is less than schedule.batch_size={rows}; use at least that, or 0 for no memory"

    options: Options

    def __init__(self, options: Options, *, num_classes: int, embedding_dim: int) -> None:
        super().__init__(options, num_classes=num_classes, embedding_dim=embedding_dim)
        self.memory = Memory(options.memory, embedding_dim) if options.memory else None

    def forget(self) -> None:
        """See ``Loss.forget``."""
        if self.memory is not None:
            self.memory.clear()

    def remembers(self, rows: StepRows) -> bool:
        """Whether this step compares with past embeddings."""
        return self.memory is not None and rows.step >= self.options.memory_from

    def of_step(self, rows: StepRows) -> tuple[Tensor, dict[str, Tensor]]:
        """Collective, with references from other ranks also in the backward. See ``Loss.of_step``."""
        learners = rows.num_learners
        with torch.autocast(rows.embeddings.device.type, enabled=False):
            found = self.learner_sums(rows)
        # Those of one dtype travel as one tensor: a launch for all of them, not for each.
        names = sorted(found.stats, key=lambda name: (str(found.stats[name].dtype), name))
        packed = [torch.stack([found.stats[name] for name in alike]) for _, alike in groupby(names, lambda name: found.stats[name].dtype)]
        # One slot more, in front, for rows of no learner.
        present = torch.zeros(learners + 1, dtype=torch.float64, device=rows.learner.device).index_fill_(0, rows.learner + 1, 1.0)[1:]
        local = torch.cat(
            [
                found.counts.double(),
                found.sums.detach().double(),
                present,
                *(values.double() for values in packed),
            ]
        )
        counts, sums, present, totals = distributed.all_reduce_sum(local).split([learners, learners, learners, len(names)])
        in_step = (present > 0).sum().clamp(min=1)
        scale = distributed.world_size() / in_step
        loss = (scale * found.sums / counts.clamp(min=1)).sum().to(rows.embeddings.dtype)
        per_learner = sums / counts.clamp(min=1)
        stats = {"loss": per_learner.sum() / in_step, "learner_loss": per_learner.where(present > 0, torch.nan)}
        return loss, stats | {name: totals[i] for i, name in enumerate(names)}

    def references(self, rows: StepRows, grad: Literal["none", "sum"]) -> References:
        """Collective. What this rank's rows are compared with; "sum": their gradients reach the ranks that they came from.

        In training the step's rows are kept for later steps.
        """
        labels, learner, row_ids = rows.gather(torch.stack([rows.labels, rows.learner, rows.row_ids], 1)).unbind(1)
        references = References(rows.gather(rows.z, grad), labels, learner, row_ids, rows.max_positives)
        memory = self.memory
        if memory is None or not self.remembers(rows):
            return references
        extended = references.extended(memory.z, memory.labels, memory.learner, memory.row_ids)
        if self.training:
            # Rows of other learners, too: every rank has the same memory, and any of them may serve any learner next.
            if rows.group is not None:
                labels, learner = rows.gather_world(torch.stack([rows.labels, rows.learner], 1)).unbind(1)
            memory.store(references.z if rows.group is None else rows.gather_world(rows.z), labels, learner)
        return extended

    @abstractmethod
    def learner_sums(self, rows: StepRows) -> LearnerSums:
        """Collective. The values of this rank's anchors, added up by learner; gradients reach the ranks of the references, too."""


class PairwiseLoss(ReferencesLoss):
    """Write ``anchor_values``: the value of each anchor's pairs. Ranks, learners and gradients of references are done here."""

    @abstractmethod
    def anchor_values(self, pairs: PairMatrix) -> tuple[Tensor, Tensor]:
        """The loss of a learner is the sum of its anchors' values divided by the sum of their counts.

        Anchors of no learner are in no pair; what is returned for them counts nowhere, but must be finite.

        Returns:
            value (b,) and count (b,), what it is a sum of: 1 for an anchor, or a number of pairs or triplets.
        """

    def learner_sums(self, rows: StepRows) -> LearnerSums:
        """Collective. See ``ReferencesLoss.learner_sums``."""
        references = self.references(rows, "sum")
        mine, learner = rows.z, rows.learner[:, None]
        together = (learner == references.learner) & (learner >= 0) & (rows.row_ids[:, None] != references.row_ids)
        alike = rows.labels[:, None] == references.labels
        cosine = mine @ references.z.T
        pairs = PairMatrix(cosine, together & alike, together & ~alike, rows.labels, references.labels, references.max_positives)
        value, count = self.anchor_values(pairs)
        # Also where values depend on no pair, a rank takes part in the backward of the gather, with the same parameters as others.
        value = value + 0 * sum((parameter.sum() for parameter in self.parameters()), (mine[0] + references.z[0]).sum())
        member = rows.learner == torch.arange(rows.num_learners, device=value.device)[:, None]  # (K, b)
        return LearnerSums(
            torch.where(member, value, 0).sum(1),
            torch.where(member, count, 0).sum(1),
            {"loss_terms": torch.where(rows.learner >= 0, count, 0).sum(), "non_finite_rows": (~mine.isfinite().all(1)).sum()},
        )


def logsumexp(x: Tensor, keep: Tensor) -> Tensor:
    """log Σ exp(x) over the last dimension, of what to keep only; -inf, and gradient 0, where that is nothing."""
    return x.masked_fill(~keep, -torch.inf).logsumexp(-1)


def log_one_plus_exp(x: Tensor) -> Tensor:
    """log(1 + exp(x)), also where x is large or -inf."""
    return torch.logaddexp(x, torch.zeros_like(x))
