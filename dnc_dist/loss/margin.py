"""Margin loss with distance-weighted negatives (Wu et al., Sampling Matters in Deep Embedding Learning, ICCV 2017)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import dnc_kernels
from dnc_dist.base.errors import InputError
from dnc_dist.loss.references import References


class MarginLoss(nn.Module):
    """Pairwise: every anchor against all its positives and as many drawn negatives inside its learner.

    Args:
        num_classes: C, the size of a learned β per class.
        margin: half-width of the band around β in which pairs are active.
        beta: boundary β between positive and negative distances, or its first value if it is learned.
        learn_beta: "fixed", "scalar" (one parameter (1,)) or "class" (one parameter (C,)).
        cutoff, nonzero_loss_cutoff, mode, effective_dim: constants of the sampling, see `dnc_kernels.Sampling`.

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
        """Collective with references. Sums per learner over the active pairs of the local anchors; the caller adds ranks and divides.

        Args:
            z: local anchors (B, D), projected and normalised; labels, learner, row_ids (B,), learner -1 in no pair.
            num_learners: K, the length of the per-learner sums.
            seed, step: key of the draws, int or 0-d int64 tensor.
            references: rows of all ranks of these learners; None: the anchors themselves.
            max_positives: upper bound of an anchor's positives, with references equal on all ranks; None counts them (on a GPU one
                wait for the device).
            masks: (K, D), where z holds embeddings that are yet to be projected; not together with references.
        """
        sampling = dnc_kernels.Sampling(
            self.cutoff, self.nonzero_loss_cutoff, self.mode, self.effective_dim, max_positives=max_positives, seed=seed, step=step
        )
        anchors = dnc_kernels.Rows(z, labels, learner, row_ids)
        beta = self.beta[0] if self.learn_beta == "scalar" else self.beta
        common: dict[str, Any] = {"beta": beta, "margin": self.margin, "num_learners": num_learners}
        if references is None:
            return dnc_kernels.margin_loss(anchors, masks=masks, sampling=sampling, **common)
        others = dnc_kernels.Rows(*references[:4])
        pairs = dnc_kernels.sample_pairs(anchors._replace(z=z.detach()), others, sampling=sampling)
        out = dnc_kernels.margin_loss_on_pairs(anchors, pairs, references.z, **common)
        if not len(pairs.other):  # no class has two rows: equal on all ranks
            return out
        as_reference = self._as_references(z, pairs, references, beta.detach(), num_learners)
        # Adds nothing to the value, which counts a pair once, with its anchor.
        return out._replace(learner_loss_sum=out.learner_loss_sum + as_reference - as_reference.detach())

    def _as_references(self, z: Tensor, pairs: dnc_kernels.Pairs, references: References, beta: Tensor, num_learners: int) -> Tensor:
        """Collective. (K,) sums over all ranks' pairs whose other row is one of this rank's, to differentiate by that row alone.

        A row gets gradient as an anchor and from every anchor that drew it, of any rank. The drawn pairs travel for this (4 bytes
        for each of an anchor's slots) instead of gradients of all references (4 D bytes for each, back to their ranks).
        """
        drawn = pairs.other.view(len(z), -1)
        slots = drawn.shape[1]
        other = references.gather(drawn.int()).flatten().long() - references.start
        here = (other >= 0) & (other < len(z))
        positive = pairs.positive.view(len(z), -1)[:1].expand(len(references.z), slots).flatten()
        anchor = torch.arange(len(references.z), device=z.device).repeat_interleave(slots)
        if z.device.type == "cpu":
            drawn_here = dnc_kernels.Pairs(anchor[here], other[here], positive[here])
        else:  # the number of pairs must not depend on values, or the host waits for the device
            drawn_here = dnc_kernels.Pairs(anchor, torch.where(here, other, -1), positive)
        return dnc_kernels.margin_loss_on_pairs(
            dnc_kernels.Rows(*references[:4]),
            drawn_here,
            z,
            beta=beta,
            margin=self.margin,
            num_learners=num_learners,
        ).learner_loss_sum
