"""`torch.library` operators of projection and margin loss around the Triton kernels, with fakes and autograd.

An operator takes tensors and numbers only, so signatures are flat here: `other`, `anchor`, `positive`, `live` and `ref_live`
are the fields of `pair_loss.PairList`. Operators copy what is not contiguous.
Shapes: B anchors, G references, D width, n pairs, K learners, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dnc_kernels import masked_gradient, pair_gradient, pair_loss, projection
from dnc_kernels.contract import Rows
from dnc_kernels.pair_loss import PairList


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
    dz: Tensor, z: Tensor, inverse_norm: Tensor, embeddings: Tensor, learner: Tensor | None, masks: Tensor | None, masks_gradient: bool
) -> tuple[Tensor, Tensor]:
    rows = projection.Projected(z, inverse_norm, embeddings.contiguous(), _contiguous(learner), _contiguous(masks))
    return projection.project_backward(dz.contiguous(), rows, masks_gradient=masks_gradient)


@project_backward_op.register_fake
def _(
    dz: Tensor, z: Tensor, inverse_norm: Tensor, embeddings: Tensor, learner: Tensor | None, masks: Tensor | None, masks_gradient: bool
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
    beta: Tensor,
    inverse_norm: Tensor | None,
    labels: Tensor,
    learner: Tensor | None,
    other: Tensor,
    anchor: Tensor | None,
    positive: Tensor | None,
    live: Tensor | None,
    ref_live: Tensor | None,
    margin: float,
    num_learners: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of PairLoss. With `embeddings`, `masks` and `inverse_norm` the gradient goes to those instead of z."""
    z = z.contiguous()
    return pair_loss.pair_loss(
        Rows(z, labels.contiguous(), _contiguous(learner)),
        z if ref_z is None else ref_z.contiguous(),
        PairList(other.contiguous(), _contiguous(anchor), _contiguous(positive), live, ref_live),
        beta=beta.contiguous(),
        margin=margin,
        num_learners=num_learners,
    )


@pair_loss_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return pair_loss.empty_pair_loss(other=inputs[8], num_learners=inputs[14])


@torch.library.custom_op("dnc_kernels::pair_gradient", mutates_args=())
def pair_gradient_op(
    gradient: Tensor,
    coefficient: Tensor,
    z: Tensor,
    ref_z: Tensor | None,
    learner: Tensor | None,
    other: Tensor,
    anchor: Tensor | None,
    live: Tensor | None,
    ref_live: Tensor | None,
    references: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = PairList(other.contiguous(), _contiguous(anchor), None, live, ref_live)
    return pair_gradient.pair_gradient(
        gradient, coefficient, z.contiguous(), _contiguous(ref_z), _contiguous(learner), pairs, references=references
    )


@pair_gradient_op.register_fake
def _(gradient: Tensor, coefficient: Tensor, z: Tensor, ref_z: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    references = others[-1]
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
    learner: Tensor | None,
    masks: Tensor,
    other: Tensor,
    live: Tensor | None,
    masks_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = projection.Projected(z, inverse_norm, embeddings.contiguous(), _contiguous(learner), masks.contiguous())
    return masked_gradient.masked_pair_gradient(
        gradient, coefficient, rows, PairList(other.contiguous(), live=live), masks_gradient=masks_gradient
    )


@masked_pair_gradient_op.register_fake
def _(
    gradient: Tensor,
    coefficient: Tensor,
    z: Tensor,
    inverse_norm: Tensor,
    embeddings: Tensor,
    learner: Tensor | None,
    masks: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    masks_gradient = others[-1]
    of_masks = masks.new_empty(masks.shape[0] if masks_gradient else 0, masks.shape[1])
    return embeddings.new_empty(embeddings.shape), of_masks, coefficient.new_empty(z.shape[0])


def _save_pair_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, distance_sums, counts, coefficient = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(distance_sums, counts, coefficient)
    *before, _positive, live, ref_live, _margin, _num_learners = inputs
    ctx.save_for_backward(*before, live, ref_live, coefficient)


def _pair_loss_gradients(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    z, ref_z, embeddings, masks, beta, inverse_norm, labels, learner, other, anchor, live, ref_live, coefficient = ctx.saved_tensors
    _, wants_ref_z, _, wants_masks, wants_beta = ctx.needs_input_grad[:5]
    of_z = of_ref_z = of_embeddings = of_masks = of_beta = None
    if gradient is not None:
        if embeddings is None:
            of_z, of_ref_z, of_boundary = pair_gradient_op(
                gradient, coefficient, z, ref_z, learner, other, anchor, live, ref_live, wants_ref_z
            )
        else:
            of_embeddings, of_masks, of_boundary = masked_pair_gradient_op(
                gradient, coefficient, z, inverse_norm, embeddings, learner, masks, other, live, wants_masks
            )
        if wants_beta:
            of_beta = _beta_gradient(of_boundary, labels, beta)
    return of_z, of_ref_z if wants_ref_z else None, of_embeddings, of_masks if wants_masks else None, of_beta, *[None] * 10


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
