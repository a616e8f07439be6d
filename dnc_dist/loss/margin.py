"""Margin loss with distance-weighted negatives (Wu et al., Sampling Matters in Deep Embedding Learning, ICCV 2017)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

import dnc_kernels
from dnc_dist.errors import InputError
from dnc_dist.loss.references import References


class MarginLoss(nn.Module):
    """Pairwise: every anchor against all its positives and as many drawn negatives inside its learner.

    Args:
        num_classes: C, the size of a learned β per class.
        margin: half-width of the band around β in which pairs are active.
        beta: boundary β between positive and negative distances, or its first value if it is learned.
        learn_beta: "fixed", "scalar" (one parameter (1,)) or "class" (one parameter (C,)).
        cutoff, nonzero_loss_cutoff, mode, effective_dim: constants of the sampling, see `dnc_kernels.sample_pairs`.

    Raises:
        InputError: a value outside what is allowed.
    """

    kind: ClassVar[str] = "pairwise"
    beta: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        margin: float = 0.2,
        beta: float = 1.2,
        learn_beta: Literal["fixed", "scalar", "class"] = "fixed",
        cutoff: float = 0.5,
        nonzero_loss_cutoff: float = 1.4,
        mode: Literal["paper", "reference"] = "paper",
        effective_dim: int | None = None,
    ) -> None:
        super().__init__()
        if learn_beta not in ("fixed", "scalar", "class"):
            raise InputError(f"loss.learn_beta={learn_beta!r}; allowed are fixed, scalar, class")
        if mode not in ("paper", "reference"):
            raise InputError(f"loss.mode={mode!r}; allowed are paper, reference")
        if not 0 < cutoff < nonzero_loss_cutoff:
            raise InputError(f"loss.cutoff={cutoff} must lie between 0 and loss.nonzero_loss_cutoff={nonzero_loss_cutoff}")
        self.margin, self.cutoff, self.nonzero_loss_cutoff = margin, cutoff, nonzero_loss_cutoff
        self.mode, self.effective_dim = mode, effective_dim
        self.learn_beta = learn_beta
        if learn_beta == "fixed":
            self.register_buffer("beta", torch.tensor(float(beta)))
        else:
            # No 0-d parameter: DeepSpeed broadcasts them as bytes, which a 0-d tensor cannot be viewed as.
            self.beta = nn.Parameter(torch.full((num_classes if learn_beta == "class" else 1,), float(beta)))

    def forward(
        self,
        z: Tensor,
        labels: Tensor,
        learner: Tensor,
        row_ids: Tensor,
        num_learners: int,
        seed: Tensor | int,
        step: Tensor | int,
        references: References | None = None,
        max_positives: int | None = None,
        masks: Tensor | None = None,
    ) -> dnc_kernels.MarginLossOutput:
        """Sums per learner over the active pairs of the local anchors; the caller adds ranks and divides.

        Args:
            z: local anchors (B, D), projected and normalised; labels, learner, row_ids (B,), learner -1 in no pair.
            num_learners: K, the length of the per-learner sums.
            seed, step: key of the draws, int or 0-d int64 tensor.
            references: rows of all ranks of these learners; None: the anchors themselves.
            max_positives: upper bound of an anchor's positives; None counts them (on a GPU one wait for the device).
            masks: (K, D), where z holds embeddings that are yet to be projected; not together with references.
        """
        return dnc_kernels.margin_loss(
            z,
            labels,
            beta=self.beta[0] if self.learn_beta == "scalar" else self.beta,
            margin=self.margin,
            masks=masks,
            num_learners=num_learners,
            learner=learner,
            ref_z=None if references is None else references.z,
            ref_labels=None if references is None else references.labels,
            ref_learner=None if references is None else references.learner,
            row_ids=row_ids,
            ref_row_ids=None if references is None else references.row_ids,
            cutoff=self.cutoff,
            nonzero_loss_cutoff=self.nonzero_loss_cutoff,
            mode=self.mode,
            effective_dim=self.effective_dim,
            seed=seed,
            step=step,
            max_positives=max_positives,
        )
