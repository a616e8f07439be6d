"""`torch.library` operators of projection and margin loss around the Triton kernels, with fakes and autograd.

Shapes: B anchors, G references, D width, n pairs, K learners, C classes. Lists of pairs are flat, or padded: without
`anchor` and `positive`, and `other` (B, slots); `live` and `ref_live` as in pair_loss.py. Operators take what the kernels
take, and copy what is not contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dnc_kernels import masked_gradient, pair_gradient, pair_loss, projection


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


@torch.library.custom_op("dnc_kernels::project", mutates_args=())
def project_op(embeddings: Tensor, learner: Tensor | None, masks: Tensor | None) -> tuple[Tensor, Tensor]:
    return projection.project(embeddings.contiguous(), _contiguous(learner), _contiguous(masks))


@project_op.register_fake
def _(embeddings: Tensor, learner: Tensor | None, masks: Tensor | None) -> tuple[Tensor, Tensor]:
    z = torch.empty(embeddings.shape, dtype=torch.float32, device=embeddings.device)
    return z, z.new_empty(embeddings.shape[0])


@torch.library.custom_op("dnc_kernels::project_backward", mutates_args=())
def project_backward_op(
    dz: Tensor,
    z: Tensor,
    inverse_norm: Tensor,
    embeddings: Tensor,
    learner: Tensor | None,
    masks: Tensor | None,
    masks_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return projection.project_backward(
        dz.contiguous(),
        z,
        inverse_norm,
        embeddings.contiguous(),
        _contiguous(learner),
        _contiguous(masks),
        masks_gradient=masks_gradient,
    )


@project_backward_op.register_fake
def _(
    dz: Tensor,
    z: Tensor,
    inverse_norm: Tensor,
    embeddings: Tensor,
    learner: Tensor | None,
    masks: Tensor | None,
    masks_gradient: bool,
) -> tuple[Tensor, Tensor]:
    width = embeddings.shape[1]
    of_masks = embeddings.new_empty(0, width) if masks is None else masks.new_empty(masks.shape[0] if masks_gradient else 0, width)
    return embeddings.new_empty(embeddings.shape), of_masks


def _save_projection(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _project_gradients(ctx: Any, dz: Tensor | None, _inverse_norm: None) -> tuple[Tensor | None, None, Tensor | None]:
    if dz is None:
        return None, None, None
    embeddings, learner, masks, z, inverse_norm = ctx.saved_tensors
    of_embeddings, of_masks = project_backward_op(dz, z, inverse_norm, embeddings, learner, masks, ctx.needs_input_grad[2])
    return of_embeddings, None, of_masks if ctx.needs_input_grad[2] else None


project_op.register_autograd(_project_gradients, setup_context=_save_projection)


@torch.library.custom_op("dnc_kernels::pair_loss", mutates_args=())
def pair_loss_op(
    z: Tensor,
    ref_z: Tensor | None,
    embeddings: Tensor | None,
    masks: Tensor | None,
    inverse_norm: Tensor | None,
    anchor: Tensor | None,
    other: Tensor,
    positive: Tensor | None,
    live: Tensor | None,
    ref_live: Tensor | None,
    labels: Tensor,
    learner: Tensor | None,
    beta: Tensor,
    margin: float,
    num_learners: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of PairLoss. With `embeddings`, `masks` and `inverse_norm` the gradient goes to those instead of z."""
    z = z.contiguous()
    return pair_loss.pair_loss(
        z,
        z if ref_z is None else ref_z.contiguous(),
        _contiguous(anchor),
        other.contiguous(),
        _contiguous(positive),
        labels.contiguous(),
        _contiguous(learner),
        beta.contiguous(),
        margin,
        num_learners,
        live=live,
        ref_live=ref_live,
    )


@pair_loss_op.register_fake
def _(
    z: Tensor,
    ref_z: Tensor | None,
    embeddings: Tensor | None,
    masks: Tensor | None,
    inverse_norm: Tensor | None,
    anchor: Tensor | None,
    other: Tensor,
    positive: Tensor | None,
    live: Tensor | None,
    ref_live: Tensor | None,
    labels: Tensor,
    learner: Tensor | None,
    beta: Tensor,
    margin: float,
    num_learners: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return pair_loss.empty_pair_loss(other, num_learners)


@torch.library.custom_op("dnc_kernels::pair_gradient", mutates_args=())
def pair_gradient_op(
    gradient: Tensor,
    coefficient: Tensor,
    z: Tensor,
    ref_z: Tensor | None,
    anchor: Tensor | None,
    other: Tensor,
    live: Tensor | None,
    ref_live: Tensor | None,
    learner: Tensor | None,
    references: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return pair_gradient.pair_gradient(
        gradient,
        coefficient,
        z.contiguous(),
        _contiguous(ref_z),
        _contiguous(anchor),
        other.contiguous(),
        _contiguous(learner),
        live=live,
        ref_live=ref_live,
        references=references,
    )


@pair_gradient_op.register_fake
def _(
    gradient: Tensor,
    coefficient: Tensor,
    z: Tensor,
    ref_z: Tensor | None,
    anchor: Tensor | None,
    other: Tensor,
    live: Tensor | None,
    ref_live: Tensor | None,
    learner: Tensor | None,
    references: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_references = ref_z.shape[0] if ref_z is not None and references else 0
    of_references = (z if ref_z is None else ref_z).new_empty(num_references, z.shape[1])
    return z.new_empty(z.shape), of_references, coefficient.new_empty(z.shape[0])


@torch.library.custom_op("dnc_kernels::masked_pair_gradient", mutates_args=())
def masked_pair_gradient_op(
    gradient: Tensor,
    coefficient: Tensor,
    z: Tensor,
    inverse_norm: Tensor,
    embeddings: Tensor,
    masks: Tensor,
    other: Tensor,
    live: Tensor | None,
    learner: Tensor | None,
    masks_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return masked_gradient.masked_pair_gradient(
        gradient,
        coefficient,
        z,
        inverse_norm,
        embeddings.contiguous(),
        masks.contiguous(),
        other.contiguous(),
        _contiguous(learner),
        live=live,
        masks_gradient=masks_gradient,
    )


@masked_pair_gradient_op.register_fake
def _(
    gradient: Tensor,
    coefficient: Tensor,
    z: Tensor,
    inverse_norm: Tensor,
    embeddings: Tensor,
    masks: Tensor,
    other: Tensor,
    live: Tensor | None,
    learner: Tensor | None,
    masks_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    of_masks = masks.new_empty(masks.shape[0] if masks_gradient else 0, masks.shape[1])
    return embeddings.new_empty(embeddings.shape), of_masks, coefficient.new_empty(z.shape[0])


def _save_pair_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, distance_sums, counts, coefficient = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(distance_sums, counts, coefficient)
    z, ref_z, embeddings, masks, inverse_norm, anchor, other, _, live, ref_live, labels, learner, beta, _, _ = inputs
    ctx.save_for_backward(z, ref_z, embeddings, masks, inverse_norm, anchor, other, live, ref_live, labels, learner, beta, coefficient)


def _pair_loss_gradients(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    z, ref_z, embeddings, masks, inverse_norm, anchor, other, live, ref_live, labels, learner, beta, coefficient = ctx.saved_tensors
    wanted = dict(zip(("z", "ref_z", "embeddings", "masks"), ctx.needs_input_grad, strict=False))
    of_z = of_ref_z = of_embeddings = of_masks = of_beta = None
    if gradient is not None:
        if embeddings is None:
            of_z, of_ref_z, of_boundary = pair_gradient_op(
                gradient, coefficient, z, ref_z, anchor, other, live, ref_live, learner, wanted["ref_z"]
            )
        else:
            of_embeddings, of_masks, of_boundary = masked_pair_gradient_op(
                gradient, coefficient, z, inverse_norm, embeddings, masks, other, live, learner, wanted["masks"]
            )
        if ctx.needs_input_grad[12]:
            of_beta = _beta_gradient(of_boundary, labels, beta)
    return (
        of_z,
        of_ref_z if wanted["ref_z"] else None,
        of_embeddings,
        of_masks if wanted["masks"] else None,
        *[None] * 8,
        of_beta,
        None,
        None,
    )


def _beta_gradient(of_boundary: Tensor, labels: Tensor, beta: Tensor) -> Tensor:
    """Anchors' gradients added by class, or all together."""
    if beta.ndim == 0:
        return of_boundary.sum().to(beta.dtype)
    num_classes = beta.shape[0]
    known = labels.clamp(0, num_classes - 1)  # a label beyond beta has made the loss NaN already
    # The backward of an embedding adds in a fixed order, index_add_ does not.
    by_class = torch.ops.aten.embedding_dense_backward(of_boundary[:, None], known, num_classes, -1, False)
    return by_class[:, 0].to(beta.dtype)


pair_loss_op.register_autograd(_pair_loss_gradients, setup_context=_save_pair_loss)
