"""Projection and margin loss of the contract on the Triton kernels: the checks, and what calls which operator.

Signatures, results and errors are those of `reference.py`. Shapes: B anchors, G references, D width, K learners, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dnc_kernels.contract import (
    DEFAULT_SAMPLING,
    MARGIN,
    MarginLossOutput,
    Pairs,
    Rows,
    Sampling,
    check_below,
    check_matrix,
    check_no_references,
    integer_column,
)
from dnc_kernels.margin_operators import pair_loss_op, project_op
from dnc_kernels.pair_loss import COUNTS, DISTANCE_SUMS, PairList
from dnc_kernels.projection import Projected
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
    anchors: Rows,
    ref_z: Tensor | None,
    listed: PairList,
    stats: dict[str, Tensor] | None,
    *,
    beta: Tensor | float,
    margin: float,
    num_learners: int,
    projected: Projected | None = None,
) -> MarginLossOutput:
    """The loss over a list of pairs; with `projected` the gradient goes to embeddings and masks instead of z."""
    z, learner = anchors.z, anchors.learner
    check_matrix("z", z)
    labels = integer_column("labels", anchors.labels, z)
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
    embeddings, masks, inverse_norm = (None,) * 3 if projected is None else (projected.embeddings, projected.masks, projected.inverse_norm)
    learner_loss_sum, distance_sums, counts, _ = pair_loss_op(
        z, ref_z, embeddings, masks, beta, inverse_norm, labels, learner, *listed, margin, num_learners
    )
    learner_num_active, named, num_active = counts.tensor_split((num_learners, num_learners + len(COUNTS)))
    stats = (
        dict(stats or {}) | dict(zip(COUNTS, named.unbind(), strict=True)) | dict(zip(DISTANCE_SUMS, distance_sums.unbind(), strict=True))
    )
    return MarginLossOutput(learner_loss_sum.sum(), num_active[0], learner_loss_sum, learner_num_active, stats)


def margin_loss_on_pairs(
    anchors: Rows, pairs: Pairs, ref_z: Tensor | None = None, *, beta: Tensor | float, margin: float = MARGIN, num_learners: int = 1
) -> MarginLossOutput:
    """Margin loss over given pairs, computed in float32; arguments and errors as the reference, float64 is a ValueError."""
    if not pairs.anchor.shape == pairs.other.shape == pairs.positive.shape or pairs.anchor.ndim != 1:
        raise ValueError("pairs: anchor, other and positive must be flat lists of equal length")
    num_anchors = anchors.z.shape[0]
    check_below("pairs.anchor", pairs.anchor, num_anchors, f"0 to {num_anchors - 1}, one per row of z", lowest=0)
    num_references = num_anchors if ref_z is None else ref_z.shape[0]
    check_below("pairs.other", pairs.other, num_references, f"-1 (an empty slot) to {num_references - 1}, one per reference")
    listed = PairList(pairs.other.long(), pairs.anchor.long(), pairs.positive.bool())
    return _loss(anchors, ref_z, listed, pairs.stats, beta=beta, margin=margin, num_learners=num_learners)


def margin_loss(
    anchors: Rows,
    references: Rows | None = None,
    *,
    beta: Tensor | float,
    margin: float = MARGIN,
    masks: Tensor | None = None,
    num_learners: int = 1,
    sampling: Sampling = DEFAULT_SAMPLING,
) -> MarginLossOutput:
    """`sample_pairs` followed by the loss over its slots; with `masks`, `anchors.z` holds raw embeddings, whose projection is fused.

    Arguments and errors as the reference; float64 is a ValueError.
    """
    projected = None
    if masks is not None:
        check_no_references(references)
        learner = _checked_projection(anchors.z, anchors.learner, masks)
        with torch.no_grad():  # the backward of the loss goes through the projection by itself
            z, inverse_norm = project_op(anchors.z, learner, masks)
        projected, anchors = Projected(z, inverse_norm, anchors.z, learner, masks), anchors._replace(z=z)
    slots = sample_slots(anchors, references, sampling=sampling)
    listed = PairList(slots.others, live=slots.live, ref_live=slots.live if references is None else slots.ref_live)
    ref_z = None if references is None else references.z
    return _loss(anchors, ref_z, listed, slots.stats, beta=beta, margin=margin, num_learners=num_learners, projected=projected)
