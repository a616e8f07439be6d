"""Backbone, embedding, masks and loss in the one module that DeepSpeed wraps.

Scaling, in one place. DeepSpeed averages gradients over the W ranks, and the loss of a step is
1/m * sum over its m learners a of  (sum over ranks of s[r,a]) / max(1, sum over ranks of n[r,a])
with s the sums over active pairs and n their counts. So rank r returns W/m * sum_a s[r,a] / max(1, N_a): the factor W undoes
the averaging (in ``loss.pairwise``). The mask penalty is the same on every rank and carries no factor. A whole-batch loss is
computed by every rank on the gathered rows; there the gather gives own rows the factor (see ``distributed.gather_rows``), loss
parameters need none. So is the distillation from learners while conquering.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dnc_dist.base.rng import uniform
from dnc_dist.data.stream import Batch
from dnc_dist.data.transforms import Augment
from dnc_dist.engine.compiled import CompiledBackbone
from dnc_dist.engine.grad_cache import in_chunks
from dnc_dist.engine.network import EmbeddingNetwork
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.teacher import FrozenTeacher
from dnc_dist.loss.base import Loss, StepRows
from dnc_dist.loss.distillation import distillation
from dnc_dist.model.batch_norm import set_valid_rows
from dnc_dist.model.embedding import EmbeddingHead
from dnc_dist.model.masks import SubspaceMasks
from dnc_dist.processes.transfer import to_device


class DncObjective(EmbeddingNetwork):
    """``forward(batch, phase)`` -> (this rank's loss, stats of the global batch). Keeps no phase and no step."""

    def __init__(
        self,
        backbone: nn.Module,
        head: EmbeddingHead,
        masks: SubspaceMasks,
        loss: Loss,
        augment: Augment,
        *,
        seed: int,
        mask_penalty: float,
        distill: float = 0.0,
        distill_temperature: float = 1.0,
        frozen_teacher: bool = False,
        autocast: torch.dtype | None,
        grad_cache_chunks: int = 1,
        compiled: CompiledBackbone | None = None,
    ) -> None:
        super().__init__(backbone, head, masks, augment, autocast=autocast)
        self.loss = loss
        self.seed, self.mask_penalty = seed, mask_penalty
        self.distill, self.distill_temperature = distill, distill_temperature
        self.teacher = FrozenTeacher(backbone, head) if frozen_teacher else None
        self.grad_cache_chunks = grad_cache_chunks
        self.compiled = compiled

    def forward(self, batch: Batch, phase: Phase) -> tuple[Tensor, dict[str, Tensor]]:
        """Collective. Loss and statistics of one step.

        Args:
            batch: this rank's rows of the step's global batch.
            phase: where the training stands.

        Returns:
            The loss to backpropagate (scaled for DeepSpeed, see above) and tensors that are equal on all ranks;
            ``loss`` there carries no factor W.
        """
        return self.loss_of(self.embed(batch, phase), batch, phase)

    def embed(self, batch: Batch, phase: Phase) -> Tensor:
        """Collective with global BatchNorm. Raw embeddings (b, D) of this rank's rows, in fp32 at least."""
        features = self._training_features(batch, phase)
        dropped = None
        if self.head.dropout > 0:
            dropped = to_device(uniform((self.seed, "dropout", phase.step), batch.slots, features.shape[1]), features.device)
        raw: Tensor = self.head(features, dropped)
        return raw

    def loss_of(self, embeddings: Tensor, batch: Batch, phase: Phase) -> tuple[Tensor, dict[str, Tensor]]:
        """Collective. What ``forward`` returns, from the raw embeddings (b, D) of the batch."""
        masks = None if phase.conquer else self.masks.level_masks(phase.level)
        rows = self._rows(embeddings, masks, batch, phase)
        loss, stats = self.loss.of_step(rows)
        penalty = embeddings.new_zeros(())
        if masks is not None and self.masks.learned:
            penalty = self.masks.penalty(masks)
            loss = loss + self.mask_penalty * penalty
        if masks is not None:
            stats |= {"mask_orthogonality": penalty.detach(), "mask_sparsity": self.masks.sparsity(masks)}
        elif self.distill:
            # The batch is of one cluster, whose learner knows it best. Masks rest, and are the same for both.
            subspaces = self._rows(self._teaching(embeddings, batch, phase), self.masks.level_masks(phase.level).detach(), batch, phase)
            divergence = distillation(rows, subspaces, self.distill_temperature)
            loss = loss + self.distill * divergence
            stats |= {"distillation": divergence.detach()}
        return loss, stats

    def change_subspaces(self, *, conquer: bool) -> None:
        """From the next step on embeddings lie in other subspaces; ``conquer``: in none, and what learners know now is what they teach."""
        self.loss.forget()
        if conquer and self.teacher is not None:
            self.teacher.take(self.backbone, self.head)

    def _teaching(self, embeddings: Tensor, batch: Batch, phase: Phase) -> Tensor:
        """(b, D) raw embeddings whose subspaces teach, without gradient: those of now, or of the frozen copy."""
        if self.teacher is None:
            return embeddings.detach()
        numbers, parts = self._numbers(batch, phase), min(self.grad_cache_chunks, len(batch.images))
        images = batch.images.tensor_split(parts)
        uniforms = [None] * parts if numbers is None else numbers.tensor_split(parts)
        pixels = (self._pixels(*part) for part in zip(images, uniforms, strict=True))
        with torch.no_grad():
            return torch.cat([self.teacher.head(self._through(self.teacher.backbone, part)) for part in pixels])

    def _numbers(self, batch: Batch, phase: Phase) -> Tensor | None:
        """(b, U) what the augmentation of each row depends on; None if it does on nothing."""
        if not self.augment.uses_uniforms:
            return None
        numbers = uniform((self.seed, "augment", phase.step), batch.slots, self.augment.num_uniforms)
        return to_device(numbers, batch.images.device)

    def _training_features(self, batch: Batch, phase: Phase) -> Tensor:
        """Collective with global BatchNorm. (b, F) augmented and through the backbone, without gradient where that waits."""
        numbers = self._numbers(batch, phase)

        def compute(images: Tensor, numbers: Tensor | None) -> Tensor:
            return self._through(self.compiled or self.backbone, self._pixels(images, numbers))

        set_valid_rows(self.backbone, batch.valid)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not phase.backbone_frozen):
            if self.grad_cache_chunks == 1:
                features = compute(batch.images, numbers)
            else:
                features = in_chunks(compute, (batch.images, numbers), self.grad_cache_chunks, self.backbone)
        set_valid_rows(self.backbone, None)
        return features

    def _rows(self, embeddings: Tensor, masks: Tensor | None, batch: Batch, phase: Phase) -> StepRows:
        """The batch in the subspaces of its learners; without masks (conquer) in the whole embedding, as one learner."""
        learner = batch.learner
        on_host = learner if batch.learner_on_host is None else batch.learner_on_host
        if masks is None:
            embeddings = self.masks.whole(embeddings)
            learner, on_host = learner.clamp(max=0), on_host.clamp(max=0)
        return StepRows(
            embeddings,
            masks,
            labels=batch.labels,
            learner=learner,
            row_ids=batch.rows,
            num_learners=1 if masks is None else phase.level,
            seed=self.seed,
            step=phase.step,
            rows_of_ranks=batch.rows_of_ranks,
            group=batch.group,
            rows_of_world=batch.rows_of_world,
            max_positives=batch.max_positives,
            learner_on_host=on_host,
        )
