"""Projection and margin loss of the contract on the Triton kernels: the checks, and what calls which operator.

Signatures, results and errors are those of `reference.py`. Shapes: B anchors, G references, D width, K learners, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dnc_kernels.contract import MarginLossOutput, Pairs, check_below, check_matrix, integer_column
from dnc_kernels.margin_operators import pair_loss_op, project_op
from dnc_kernels.pair_loss import COUNTS, DISTANCE_SUMS
from dnc_kernels.sampling import sample_pairs, sample_slots
from dnc_kernels.target import check_dtypes

__all__ = ["margin_loss", "margin_loss_on_pairs", "project", "sample_pairs"]


def _checked_projection(embeddings: Tensor, learner: Tensor | None, masks: Tensor | None) -> Tensor | None:
    """The learner that the projection reads: int64, None where there is only mask 0."""
    check_matrix("embeddings", embeddings)
    check_dtypes(embeddings=embeddings, masks=masks)
    if masks is None:
        return None
    check_matrix("masks", masks, width=embeddings.shape[1], device=embeddings.device)
    if learner is None:
        return None
    learner = integer_column("learner", learner, embeddings)
    check_below("learner", learner, masks.shape[0], f"-1 (in no learner) to {masks.shape[0] - 1}, one per row of masks")
    return learner


def project(embeddings: Tensor, learner: Tensor | None, masks: Tensor | None) -> Tensor:
    """Embeddings in the subspace of their learner: z = normalise(relu(m_a) ⊙ e), (B, D) float32.

    Arguments and errors as `reference.project`; float64 is a ValueError.
    """
    return project_op(embeddings, _checked_projection(embeddings, learner, masks), masks)[0]


def _boundary(beta: Tensor | float, z: Tensor) -> Tensor:
    if not isinstance(beta, Tensor):
        return torch.full((), beta, dtype=torch.float32, device=z.device)
    check_dtypes(beta=beta)
    if beta.device != z.device:
        raise ValueError(f"beta is on {beta.device}, z is on {z.device}")
    if beta.ndim > 1:
        raise ValueError(f"beta must be a number or one number per class (C,); got shape {tuple(beta.shape)}")
    return beta


def _loss(
    z: Tensor,
    labels: Tensor,
    other: Tensor,
    *,
    flat: tuple[Tensor, Tensor] | None,
    live: tuple[Tensor, Tensor] | None,
    masked: tuple[Tensor, Tensor, Tensor] | None,
    stats: dict[str, Tensor] | None,
    beta: Tensor | float,
    margin: float,
    learner: Tensor | None,
    num_learners: int,
    ref_z: Tensor | None,
) -> MarginLossOutput:
    """The loss over a flat list with anchors and positives, or over padded slots; `masked` gets the gradient instead of z."""
    check_matrix("z", z)
    labels = integer_column("labels", labels, z)
    if ref_z is not None:
        check_matrix("ref_z", ref_z, width=z.shape[1], device=z.device)
    check_dtypes(z=z, ref_z=ref_z)
    beta = _boundary(beta, z)
    if learner is not None:
        learner = integer_column("learner", learner, z)
        check_below("learner", learner, num_learners, f"-1 (in no learner) to num_learners-1={num_learners - 1}")
    if beta.ndim == 1 and labels.device.type == "cpu":  # elsewhere the kernel counts such labels
        in_learner = labels if learner is None else labels.masked_fill(learner < 0, 0)
        check_below("labels", in_learner, beta.shape[0], f"0 to {beta.shape[0] - 1}, one per entry of beta", lowest=0)
    embeddings, masks, inverse_norm = masked or (None, None, None)
    anchor, positive = flat or (None, None)
    own_live, ref_live = live or (None, None)
    learner_loss_sum, distance_sums, counts, _ = pair_loss_op(
        z, ref_z, embeddings, masks, inverse_norm, anchor, other, positive, own_live, ref_live, labels, learner, beta, margin, num_learners
    )
    learner_num_active, named, num_active = counts.tensor_split((num_learners, num_learners + len(COUNTS)))
    stats = (
        dict(stats or {}) | dict(zip(COUNTS, named.unbind(), strict=True)) | dict(zip(DISTANCE_SUMS, distance_sums.unbind(), strict=True))
    )
    return MarginLossOutput(learner_loss_sum.sum(), num_active[0], learner_loss_sum, learner_num_active, stats)


def margin_loss_on_pairs(
    z: Tensor,
    labels: Tensor,
    pairs: Pairs,
    *,
    beta: Tensor | float,
    margin: float = 0.2,
    learner: Tensor | None = None,
    num_learners: int = 1,
    ref_z: Tensor | None = None,
) -> MarginLossOutput:
    """Margin loss over given pairs, computed in float32; arguments and errors as the reference, float64 is a ValueError."""
    if not pairs.anchor.shape == pairs.other.shape == pairs.positive.shape or pairs.anchor.ndim != 1:
        raise ValueError("pairs: anchor, other and positive must be flat lists of equal length")
    check_below("pairs.anchor", pairs.anchor, z.shape[0], f"0 to {z.shape[0] - 1}, one per row of z", lowest=0)
    num_references = (z if ref_z is None else ref_z).shape[0]
    check_below("pairs.other", pairs.other, num_references, f"-1 (an empty slot) to {num_references - 1}, one per reference")
    return _loss(
        z,
        labels,
        pairs.other.long(),
        flat=(pairs.anchor.long(), pairs.positive.bool()),
        live=None,
        masked=None,
        stats=pairs.stats,
        beta=beta,
        margin=margin,
        learner=learner,
        num_learners=num_learners,
        ref_z=ref_z,
    )


def margin_loss(
    z: Tensor,
    labels: Tensor,
    *,
    beta: Tensor | float,
    margin: float = 0.2,
    masks: Tensor | None = None,
    num_learners: int = 1,
    learner: Tensor | None = None,
    ref_z: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ref_learner: Tensor | None = None,
    row_ids: Tensor | None = None,
    ref_row_ids: Tensor | None = None,
    cutoff: float = 0.5,
    nonzero_loss_cutoff: float = 1.4,
    mode: str = "paper",
    effective_dim: float | None = None,
    seed: Tensor | int = 0,
    step: Tensor | int = 0,
    max_positives: int | None = None,
) -> MarginLossOutput:
    """`sample_pairs` followed by the loss over its slots; with `masks` z holds raw embeddings, whose projection is fused.

    Arguments and errors as the reference; float64 is a ValueError.
    """
    masked = None
    if masks is not None:
        if ref_z is not None:
            raise ValueError("masks cannot be combined with ref_z: project the embeddings first, then gather them as references")
        with torch.no_grad():  # the backward of the loss goes through the projection by itself
            projected, inverse_norm = project_op(z, _checked_projection(z, learner, masks), masks)
        z, masked = projected, (z, masks, inverse_norm)
    slots = sample_slots(
        z,
        labels,
        learner=learner,
        ref_z=ref_z,
        ref_labels=ref_labels,
        ref_learner=ref_learner,
        row_ids=row_ids,
        ref_row_ids=ref_row_ids,
        cutoff=cutoff,
        nonzero_loss_cutoff=nonzero_loss_cutoff,
        mode=mode,
        effective_dim=effective_dim,
        seed=seed,
        step=step,
        max_positives=max_positives,
    )
    return _loss(
        z,
        labels,
        slots.others,
        flat=None,
        live=(slots.live, slots.live if ref_z is None else slots.ref_live),
        masked=masked,
        stats=slots.stats,
        beta=beta,
        margin=margin,
        learner=learner,
        num_learners=num_learners,
        ref_z=ref_z,
    )
