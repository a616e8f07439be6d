"""Backbone, embedding, masks and loss in the one module that DeepSpeed wraps.

Scaling, in one place. DeepSpeed averages gradients over the W ranks, and the loss of a step is
1/m * sum over its m learners a of  (sum over ranks of s[r,a]) / max(1, sum over ranks of n[r,a])
with s the sums over active pairs and n their counts. So rank r returns W/m * sum_a s[r,a] / max(1, N_a): the factor W undoes
the averaging. The mask penalty is the same on every rank and carries no factor. A whole-batch loss is computed by every rank on
the gathered rows; there the gather gives own rows the factor (see ``distributed.gather_rows``), loss parameters need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

import dnc_kernels
from dnc_dist.base.rng import uniform
from dnc_dist.data.stream import Batch
from dnc_dist.data.transforms import Augment
from dnc_dist.engine.plan import Phase
from dnc_dist.loss import References
from dnc_dist.model.batch_norm import set_valid_rows
from dnc_dist.model.embedding import EmbeddingHead, at_least_fp32, inference
from dnc_dist.model.masks import SubspaceMasks
from dnc_dist.processes import distributed


class Rows(NamedTuple):
    """What the loss needs of some rows: z (n, D) unit embeddings; labels, learner, row_ids (n,) int64, learner -1 in no pair.

    With ``masks`` (k, D), z holds embeddings that the loss has yet to project.
    """

    z: Tensor
    labels: Tensor
    learner: Tensor
    row_ids: Tensor
    masks: Tensor | None = None


class DncObjective(nn.Module):
    """``forward(batch, phase)`` -> (this rank's loss, stats of the global batch). Keeps no phase and no step."""

    def __init__(
        self,
        backbone: nn.Module,
        head: EmbeddingHead,
        masks: SubspaceMasks,
        loss: nn.Module,
        augment: Augment,
        *,
        seed: int,
        mask_penalty: float,
        autocast: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.masks, self.loss, self.augment = backbone, head, masks, loss, augment
        self.seed, self.mask_penalty, self.autocast = seed, mask_penalty, autocast

    def forward(
        self, batch: Batch, phase: Phase, *, group: ProcessGroup | None = None, max_positives: int | None = None, stop: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Collective. Loss and statistics of one step.

        Args:
            batch: this rank's rows of the step's global batch.
            phase: where the training stands.
            group: the ranks that share this rank's learners; None: all.
            max_positives: upper bound of an image's positives in the global batch, equal on all ranks; None: counted, which waits
                for a GPU.
            stop: this rank was asked to stop; ``stats["stop"]`` tells on how many ranks that is so.

        Returns:
            The loss to backpropagate (scaled for DeepSpeed, see above) and 0-d tensors that are equal on all ranks;
            ``loss`` there carries no factor W.
        """
        numbers = None
        if self.augment.uses_uniforms:
            numbers = uniform((self.seed, "augment", phase.step), batch.positions.cpu(), self.augment.num_uniforms)
        images = self._pixels(batch.images, numbers)
        set_valid_rows(self.backbone, batch.valid)
        with self._autocast(images.device):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not phase.backbone_frozen):
                features = self.backbone(images)
            dropped = None
            if self.head.dropout > 0:
                dropped = uniform((self.seed, "dropout", phase.step), batch.positions.cpu(), features.shape[1]).to(features.device)
            embeddings = at_least_fp32(self.head(features, dropped))
        set_valid_rows(self.backbone, None)

        masks = None if phase.conquer else self.masks.level_masks(phase.level)
        # With references from other ranks embeddings are projected before they are gathered; alone, the loss does it in one go.
        gathered = self.loss.kind != "pairwise" or distributed.group_size(group) > 1
        rows = self._rows(embeddings, batch, masks, project=gathered)
        learners = phase.level if not phase.conquer else 1
        if self.loss.kind == "pairwise":
            loss, stats = self._pairwise(rows, learners, phase.step, group, batch.rows_of_ranks, max_positives, stop)
        else:
            loss, stats = self._whole_batch(rows, masks, learners, group, batch.rows_of_ranks, stop)
        penalty = embeddings.new_zeros(())
        if masks is not None and self.masks.kind == "learned":
            penalty = self.masks.penalty(masks)
            loss = loss + self.mask_penalty * penalty
        if masks is not None:
            stats |= {"mask_orthogonality": penalty.detach(), "mask_sparsity": self.masks.sparsity(masks)}
        return loss, stats

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, F) L2-normalised backbone features in fp32, as k-means sees them. In evaluation mode."""
        with self._autocast(images.device):
            features = self.backbone(self._pixels(images))
        return F.normalize(features.float(), dim=1)

    def embeddings(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D) unit embeddings as retrieval compares them: the whole embedding. In evaluation mode."""
        with self._autocast(images.device):
            embeddings = self.head(self.backbone(self._pixels(images)))
        return inference(embeddings, self.masks.kind, self.masks.num_learners)

    def _pixels(self, images: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """Augmented, normalised pixels in the memory layout that convolutions are fastest in (1.6 times on the CPU)."""
        return self.augment(images, uniforms).contiguous(memory_format=torch.channels_last)

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    def _rows(self, embeddings: Tensor, batch: Batch, masks: Tensor | None, *, project: bool) -> Rows:
        """The batch in the subspaces of its learners; without masks (conquer) in the whole embedding, as one learner."""
        if masks is None:
            z = inference(embeddings, self.masks.kind, self.masks.num_learners)
            return Rows(z, batch.labels, torch.where(batch.valid, 0, -1), batch.rows)
        learner = torch.where(batch.valid, batch.learner, -1)
        if not project:
            return Rows(embeddings, batch.labels, learner, batch.rows, masks)
        return Rows(dnc_kernels.project(embeddings, learner, masks), batch.labels, learner, batch.rows)

    def _pairwise(
        self,
        rows: Rows,
        learners: int,
        step: int,
        group: ProcessGroup | None,
        rows_of_ranks: Sequence[int],
        max_positives: int | None,
        stop: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Local anchors against the references of all ranks of the group."""
        references = None
        if distributed.group_size(group) > 1:
            gather = partial(distributed.gather_rows, counts=rows_of_ranks, group=group)
            labels, learner, row_ids = gather(torch.stack([rows.labels, rows.learner, rows.row_ids], 1)).unbind(1)
            references = References(gather(rows.z), labels, learner, row_ids, sum(rows_of_ranks[: distributed.group_rank(group)]), gather)
            if max_positives is None:  # counted where all ranks count the same
                max_positives = int(labels.unique(return_counts=True)[1].max()) - 1
        out = self.loss(rows.z, rows.labels, rows.learner, rows.row_ids, learners, self.seed, step, references, max_positives, rows.masks)
        names = sorted(out.stats)
        # One slot more, in front, for rows of no learner.
        present = torch.zeros(learners + 1, dtype=torch.float64, device=rows.z.device).index_fill_(0, rows.learner + 1, 1.0)[1:]
        local = torch.cat(
            [
                out.learner_num_active.double(),
                out.learner_loss_sum.detach().double(),
                present,
                torch.stack([out.stats[name].double() for name in names]) if names else present[:0],
                present.new_tensor([float(stop)]),
            ]
        )
        reduced = distributed.all_reduce_sum(local)
        active, sums, present, counts, stopped = reduced.split([learners, learners, learners, len(names), 1])
        in_step = (present > 0).sum().clamp(min=1)
        scale = distributed.world_size() / in_step
        loss = (scale * out.learner_loss_sum / active.clamp(min=1)).sum().to(rows.z.dtype)
        per_learner = sums / active.clamp(min=1)
        stats = {"loss": per_learner.sum() / in_step, "active_pairs": active.sum(), "stop": stopped[0]}
        stats |= {"learner_loss": per_learner.where(present > 0, torch.nan)}
        return loss, stats | {name: counts[i] for i, name in enumerate(names)}

    def _whole_batch(
        self, rows: Rows, masks: Tensor | None, learners: int, group: ProcessGroup | None, rows_of_ranks: Sequence[int], stop: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Every rank computes the loss of the group's learners on the gathered rows, in the order of the global batch."""
        z = distributed.gather_rows(rows.z, grad="own", counts=rows_of_ranks, group=group)
        labels, learner = distributed.gather_rows(torch.stack([rows.labels, rows.learner], 1), counts=rows_of_ranks, group=group).unbind(1)
        present = [a for a in range(learners) if bool((learner == a).any())]
        losses = {a: self.loss(z[learner == a], labels[learner == a], None if masks is None else masks[a]) for a in present}
        share = 1.0 / distributed.group_size(group)
        values = torch.zeros(2 * learners + 1, dtype=torch.float64, device=z.device)
        for a, value in losses.items():
            values[a], values[learners + a] = share * value.detach(), share
        values[-1] = float(stop)
        sums, counts, stopped = distributed.all_reduce_sum(values).split([learners, learners, 1])
        in_step = (counts > 0).sum().clamp(min=1)
        per_learner = torch.where(counts > 0, sums / counts.clamp(min=1e-12), torch.nan)
        stats = {"loss": torch.where(counts > 0, per_learner, 0.0).sum() / in_step, "learner_loss": per_learner, "stop": stopped[0]}
        # A group without a decodable row has no loss, but takes part in the backward's collectives with the same parameters.
        nothing = 0 * sum((parameter.sum() for parameter in self.loss.parameters()), z.sum())
        scale = (distributed.world_size() * share / in_step).to(z.dtype)
        return nothing + scale * torch.stack(list(losses.values()) or [nothing]).sum(), stats
