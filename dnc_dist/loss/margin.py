"""Margin loss with distance-weighted negatives (Wu et al., Sampling Matters in Deep Embedding Learning, ICCV 2017)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

import dnc_kernels
from dnc_dist.loss.base import StepRows
from dnc_dist.loss.drawn import DrawnPairsLoss
from dnc_dist.loss.pairwise import References


class MarginLoss(DrawnPairsLoss):
    """Every anchor against all its positives and as many drawn negatives inside its learner.

    Σ relu(d_ap - β + margin) + Σ relu(β - d_an + margin), divided by the number of active pairs (equations 5 and 6). What is drawn
    is described at ``dnc_kernels.sample_pairs``.
    """

    class Options(DrawnPairsLoss.Options):
        """Margin loss with distance-weighted negatives (Wu et al., ICCV 2017)."""

        margin: float = Field(0.2, gt=0)
        """Half-width of the band around beta in which pairs are active."""
        beta: float = Field(1.2, gt=0)
        """Boundary between positive and negative distances (its start value if learned)."""
        learn_beta: Literal["fixed", "scalar", "class"] = "fixed"
        """Whether beta is fixed, learned as one number, or learned per class."""
        cutoff: float = Field(0.5, gt=0, lt=2)
        """Distances below it are weighted as if they were it."""
        nonzero_loss_cutoff: float = Field(1.4, gt=0, le=2)
        """Negatives farther away are not drawn."""
        mode: Literal["paper", "reference"] = "paper"
        """`paper`: log-domain weights; `reference`: also the weight floors of the published implementation."""
        effective_dim: int | None = Field(None, ge=3)
        """Dimension n in the distance weights; null: the embedding's width."""

        @model_validator(mode="after")
        def _check(self) -> Any:
            if self.cutoff >= self.nonzero_loss_cutoff:
                raise ValueError(f"cutoff={self.cutoff} must be below nonzero_loss_cutoff={self.nonzero_loss_cutoff}")
            return self

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"learn_beta": "scalar"}, {"learn_beta": "class"})
    options: Options
    beta: Tensor

    def __init__(self, options: Options, *, num_classes: int, embedding_dim: int) -> None:
        super().__init__(options, num_classes=num_classes, embedding_dim=embedding_dim)
        if options.learn_beta == "fixed":
            self.register_buffer("beta", torch.tensor(float(options.beta)))
        else:
            # No 0-d parameter: DeepSpeed broadcasts them as bytes, which a 0-d tensor cannot be viewed as.
            self.beta = nn.Parameter(torch.full((num_classes if options.learn_beta == "class" else 1,), float(options.beta)))

    def draw(self, rows: StepRows, references: References) -> dnc_kernels.Pairs:
        """See ``DrawnPairsLoss.draw``."""
        anchors = dnc_kernels.Rows(rows.z.detach(), rows.labels, rows.learner, rows.row_ids)
        others = dnc_kernels.Rows(references.z, references.labels, references.learner, references.row_ids)
        return dnc_kernels.sample_pairs(anchors, others, sampling=self._sampling(rows, references.max_positives))

    def on_pairs(
        self, anchors: References, pairs: dnc_kernels.Pairs, ref_z: Tensor, num_learners: int, *, learn: bool
    ) -> dnc_kernels.MarginLossOutput:
        """See ``DrawnPairsLoss.on_pairs``."""
        return dnc_kernels.margin_loss_on_pairs(
            dnc_kernels.Rows(anchors.z, anchors.labels, anchors.learner),
            pairs,
            ref_z,
            beta=self._beta() if learn else self._beta().detach(),
            margin=self.options.margin,
            num_learners=num_learners,
        )

    def draw_and_sum(self, rows: StepRows) -> dnc_kernels.MarginLossOutput:
        """See ``DrawnPairsLoss.draw_and_sum``; the projection is a part of the kernel, too."""
        return dnc_kernels.margin_loss(
            dnc_kernels.Rows(rows.embeddings, rows.labels, rows.learner, rows.row_ids),
            beta=self._beta(),
            margin=self.options.margin,
            masks=rows.masks,
            num_learners=rows.num_learners,
            sampling=self._sampling(rows, rows.max_positives),
        )

    def _beta(self) -> Tensor:
        return self.beta[0] if self.options.learn_beta == "scalar" else self.beta

    def _sampling(self, rows: StepRows, max_positives: int | None) -> dnc_kernels.Sampling:
        options = self.options
        return dnc_kernels.Sampling(
            options.cutoff, options.nonzero_loss_cutoff, options.mode, options.effective_dim, max_positives, rows.seed, rows.step
        )
