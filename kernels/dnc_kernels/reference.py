"""The specification of the kernels in plain torch: any floating dtype, any device, no Python loop over rows.

Shapes: B anchors, G references, D embedding, K learners, C classes, N rows of k-means. `kernels/README.md` has the
mathematics. Sampling stands in `reference_sampling.py`; values that carry a gradient stay in z's dtype, float32 at least.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding

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
from dnc_kernels.reference_sampling import negative_weights, sample_pairs

__all__ = ["lloyd_step", "margin_loss", "margin_loss_on_pairs", "negative_weights", "project", "sample_pairs"]

NORM_SQUARED_MIN = 1e-24  # below, a row is taken for zero
BLOCK_ELEMENTS = 1 << 22  # of x converted at once in a Lloyd step


def _computed(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def project(embeddings: Tensor, learner: Tensor | None, masks: Tensor | None) -> Tensor:
    """Embeddings in the subspace of their learner: z = normalise(relu(m_a) ⊙ e), float32 at least.

    Args:
        embeddings: (B, D).
        learner: (B,) integers below K, or None for learner 0; -1 takes mask 0, stays finite and is in no pair.
        masks: (K, D), or None for the whole embedding (conquer).

    Returns:
        z (B, D); a row that the mask wipes out is 0 with gradient 0.

    Raises:
        ValueError: wrong shape, type or device, or on CPU a learner without mask.
    """
    check_matrix("embeddings", embeddings)
    hidden = _computed(embeddings)
    if masks is not None:
        check_matrix("masks", masks, width=embeddings.shape[1], device=embeddings.device)
        rows = torch.relu(_computed(masks))
        if learner is None:
            hidden = hidden * rows[0]
        else:
            learner = integer_column("learner", learner, embeddings)
            check_below("learner", learner, masks.shape[0], f"-1 (in no learner) to {masks.shape[0] - 1}, one per row of masks")
            hidden = hidden * embedding(learner.clamp_min(0), rows)  # as rows[…], with a faster backward
    norm_squared = hidden.square().sum(1, keepdim=True)
    zero = norm_squared <= NORM_SQUARED_MIN  # not so a NaN: it must come out as NaN and be counted, not become a zero row
    return hidden * norm_squared.masked_fill(zero, 1.0).rsqrt().masked_fill(zero, 0.0)


class _PairDistances(torch.autograd.Function):
    """Distances of listed pairs by direct difference, (n,); 0 in empty slots. The gradient is 0 in empty slots and at d = 0."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, ref_z: Tensor, anchor: Tensor, other: Tensor, used: Tensor) -> Tensor:
        difference = z.index_select(0, anchor).sub_(ref_z.index_select(0, other.clamp_min(0)))
        distance = torch.linalg.vector_norm(difference, dim=1).masked_fill_(~used, 0.0)
        # An empty slot counts as of a row after the last: whatever row it points at, a NaN included, gets nothing of it.
        anchor, other = anchor.masked_fill(~used, z.shape[0]), other.masked_fill(~used, ref_z.shape[0])
        ctx.save_for_backward(difference, distance, anchor, other)
        ctx.num_anchors, ctx.num_references = z.shape[0], ref_z.shape[0]
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        difference, distance, anchor, other = ctx.saved_tensors
        apart = distance > 0
        # ∇ d = (z - z') / d; where d = 0 the slope is infinite, and the branch not taken must be finite.
        slope = torch.where(apart, gradient / torch.where(apart, distance, 1.0), 0.0)
        pulled = difference * slope[:, None]
        return _sum_rows(pulled, anchor, ctx.num_anchors), -_sum_rows(pulled, other, ctx.num_references), None, None, None


def _sum_rows(values: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """(num_rows, D) sums of the rows of values by index, of which `num_rows` is left out.

    The backward of an embedding: faster than `index_add_` on CPU, and in a fixed order on a GPU.
    """
    return torch.ops.aten.embedding_dense_backward(values, index, num_rows + 1, num_rows, False)[:num_rows]


def margin_loss_on_pairs(
    anchors: Rows, pairs: Pairs, ref_z: Tensor | None = None, *, beta: Tensor | float, margin: float = MARGIN, num_learners: int = 1
) -> MarginLossOutput:
    """Margin loss over given pairs: Σ relu(d_ap - β_y + margin) + Σ relu(β_y - d_an + margin) (Wu et al. 2017, eq. 6).

    Distances are taken by direct difference, in float32 at least; their gradient is 0 at d = 0.

    Args:
        anchors: B rows; their learner splits the sums, pairs of learner -1 count nowhere.
        ref_z: (G, D), the references that `pairs.other` indexes; None for the anchors themselves.
        beta: boundary, a number, a 0-d tensor or (C,) indexed by the anchor's label.
        num_learners: K, the length of the sums.

    Raises:
        ValueError: wrong shapes, types or devices; on CPU also a label without β or a learner beyond `num_learners`.
            Elsewhere nothing waits for the device: a label without β makes the loss NaN and is counted in
            `stats["labels_beyond_beta"]`.
    """
    z, learner = anchors.z, anchors.learner
    check_matrix("z", z)
    labels = integer_column("labels", anchors.labels, z)
    ref_z = z if ref_z is None else ref_z
    check_matrix("ref_z", ref_z, width=z.shape[1], device=z.device)
    if not pairs.anchor.shape == pairs.other.shape == pairs.positive.shape or pairs.anchor.ndim != 1:
        raise ValueError("pairs: anchor, other and positive must be flat lists of equal length")
    # new_full, not new_tensor: a number travels as a kernel argument, a tensor made of it would be copied and waited for.
    beta = _computed(beta) if isinstance(beta, Tensor) else _computed(z).new_full((), beta)
    if beta.device != z.device:
        raise ValueError(f"beta is on {beta.device}, z is on {z.device}")
    if beta.ndim > 1:
        raise ValueError(f"beta must be a number or one number per class (C,); got shape {tuple(beta.shape)}")

    anchor, slot_used = pairs.anchor, pairs.other >= 0
    if learner is None:
        pair_learner = torch.zeros_like(anchor)
    else:
        learner = integer_column("learner", learner, z)
        check_below("learner", learner, num_learners, f"-1 (in no learner) to num_learners-1={num_learners - 1}")
        pair_learner = learner[anchor]
        slot_used = slot_used & (pair_learner >= 0)
    beyond_beta = torch.zeros_like(labels, dtype=torch.bool)
    if beta.ndim == 1:
        classes = beta.shape[0]
        in_learner = labels if learner is None else labels.masked_fill(learner < 0, 0)
        check_below("labels", in_learner, classes, f"0 to {classes - 1}, one per entry of beta", lowest=0)
        beyond_beta = (in_learner < 0) | (in_learner >= classes)
        beta = beta[labels[anchor].clamp(0, max(0, classes - 1))].masked_fill(beyond_beta[anchor], torch.nan)

    distance = _PairDistances.apply(_computed(z), _computed(ref_z), anchor, pairs.other, slot_used)
    terms = torch.relu(torch.where(pairs.positive, 1.0, -1.0).to(distance.dtype) * (distance - beta) + margin)

    member = (pair_learner == torch.arange(num_learners, device=z.device)[:, None]) & slot_used  # (K, n)
    active = terms > 0
    learner_loss_sum = torch.where(member, terms, 0.0).sum(1)
    learner_num_active = (member & active).sum(1)
    kinds = torch.stack([pairs.positive, ~pairs.positive]) & slot_used  # (2, n)
    numbers = torch.cat([kinds, kinds & active]).sum(1).unbind()
    distance_sums = torch.where(kinds, distance.detach(), 0.0).sum(1).unbind()
    stats = dict(pairs.stats or {}) | {"labels_beyond_beta": beyond_beta.sum()}
    stats |= zip(("positive_pairs", "negative_pairs", "active_positive_pairs", "active_negative_pairs"), numbers, strict=True)
    stats |= zip(("positive_distance_sum", "negative_distance_sum"), distance_sums, strict=True)
    return MarginLossOutput(learner_loss_sum.sum(), learner_num_active.sum(), learner_loss_sum, learner_num_active, stats)


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
    """`sample_pairs` followed by `margin_loss_on_pairs`; see there for the arguments.

    With `masks` (K, D), `anchors.z` holds raw embeddings that are projected first. This excludes references: across ranks
    z is projected before it is gathered.

    Raises:
        ValueError: as the two functions; masks together with references.
    """
    if masks is not None:
        check_no_references(references)
        anchors = anchors._replace(z=project(anchors.z, anchors.learner, masks))
    pairs = sample_pairs(anchors, references, sampling=sampling)
    ref_z = None if references is None else references.z
    return margin_loss_on_pairs(anchors, pairs, ref_z, beta=beta, margin=margin, num_learners=num_learners)


@torch.no_grad()
def lloyd_step(x: Tensor, centroids: Tensor, *, restrict: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass of Lloyd's algorithm over x: nearest centroid of every row, and what the next centroids are made of.

    Args:
        x: (N, D), N may be 0. centroids: (K, D).
        restrict: (N,) integers, the parent p of each row: it may only join centroid 2p or 2p+1, so that all 2-means
            splits of a division run in one call; -1 leaves the row out.

    Returns:
        assignment (N,) int64, -1 for rows left out, the lowest index among equally near centroids;
        distance (N,), the squared Euclidean distance to the assigned centroid by direct difference, 0 for rows left out;
        sums (K, D) float64 and counts (K,) int64 of the assigned rows. A NaN in x shows up in distance and sums.

    Raises:
        ValueError: wrong shapes, types or devices; an odd number of centroids with `restrict`; on CPU a parent beyond them.
    """
    check_matrix("x", x)
    check_matrix("centroids", centroids, width=x.shape[1], device=x.device)
    num_centroids, device = centroids.shape[0], x.device
    if num_centroids == 0:
        raise ValueError("centroids is empty")
    if restrict is not None:
        restrict = integer_column("restrict", restrict, x)
        if num_centroids % 2:
            raise ValueError(f"restrict needs a pair of centroids for every parent; got {num_centroids} centroids")
        check_below("restrict", restrict, num_centroids // 2, f"-1 (left out) to {num_centroids // 2 - 1}")
    means = _computed(centroids).to(torch.promote_types(_computed(x).dtype, _computed(centroids).dtype))
    half_norms = 0.5 * means.square().sum(1)
    column = torch.arange(num_centroids, device=device)
    assignment = torch.empty(x.shape[0], dtype=torch.int64, device=device)
    distance = torch.empty(x.shape[0], dtype=means.dtype, device=device)
    sums = torch.zeros(centroids.shape, dtype=torch.float64, device=device)
    counts = torch.zeros(num_centroids, dtype=torch.int64, device=device)
    size = max(1, BLOCK_ELEMENTS // max(1, x.shape[1] + num_centroids))
    for start in range(0, x.shape[0], size):
        rows = slice(start, start + size)
        block = x[rows].to(means.dtype)
        score = torch.addmm(half_norms, block, means.T, alpha=-1.0)  # |c|²/2 - x·c orders centroids as the distance does
        taken = torch.ones(block.shape[0], dtype=torch.bool, device=device)
        if restrict is not None:
            score.masked_fill_(column // 2 != restrict[rows, None], torch.inf)
            taken = restrict[rows] >= 0
        nearest = score.argmin(1)
        member = (nearest[:, None] == column) & taken[:, None]  # (b, K)
        assignment[rows] = torch.where(taken, nearest, -1)
        distance[rows] = torch.where(taken, (block - means[nearest]).square().sum(1), 0.0)
        # A one-hot product, not index_add_: the same digits in every run on a GPU, too.
        sums += member.T.double() @ block.double()
        counts += member.sum(0)
    return assignment, distance, sums, counts
