"""BatchNorm for few rows per rank: frozen statistics, or statistics of the global batch with their exact gradient.

A rank's share of a batch is small and, inside one learner, of few classes: local statistics would make the result
depend on the number of ranks. ``frozen`` keeps a pretrained network's running statistics; ``global`` uses the
statistics over the rows of all ranks, so that W ranks equal one.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dnc_dist.base.errors import InputError
from dnc_dist.processes import distributed
from dnc_dist.processes.transfer import to_device

BatchNormKind = Literal["frozen", "global"]


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (like.dim() - 2))


def _local_sums(x: Tensor, like: Tensor) -> Tensor:
    """(2C + 1,) float64: per channel the sum and the sum of squares of x (B, C, ...), and how many values a channel has."""
    channels = x.shape[1]
    count = x.numel() // channels
    if count == 0:
        return x.new_zeros(2 * channels + 1, dtype=torch.float64)
    # The kernel of F.batch_norm. It wants running statistics to update, and their dtype makes it return fp32 for bf16 input.
    unread = like.new_zeros(2, channels)
    moments = torch.stack(torch.batch_norm_update_stats(x, unread[0], unread[1], 0.0)).double()
    # In float64 the sum of squares loses nothing that matters unless |mean| exceeds the deviation by some 1e6.
    moments[1].addcmul_(moments[0], moments[0])
    return torch.cat([moments.flatten(), moments.new_ones(1)]).mul_(count)


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, pulls: Tensor, valid: Tensor | None) -> Tensor:
    """dx = w / s * (dy - mean(dy) - x' mean(dy x')), x' = (x - mean) / s.

    Every row's output moves with the statistics, and the statistics with every rank's valid rows.

    Args:
        grad: dy, as x (B, C, ...).
        inverse: 1 / s, (C,) as weight and mean.
        pulls: (2, C) float64, mean(dy x') and mean(dy) over the valid rows of all ranks.
        valid: rows (V,) that the statistics are of, None: all. The others move no statistic: of them the last two terms are 0.
    """
    if x.device.type == "cuda" and valid is None:
        # torch's own kernel: in fp32 whatever x is, and one pass over x. What it takes for sums are means here, of a count of 1.
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        return torch.batch_norm_backward_elemt(
            grad.contiguous(memory_format=layout),
            x.contiguous(memory_format=layout),
            mean,
            inverse,
            weight,
            pulls[1].to(mean.dtype),
            (pulls[0] / inverse).to(mean.dtype),  # mean(dy (x - mean))
            torch.ones(1, dtype=torch.int32, device=x.device),
        )
    scale = (weight * inverse).double()
    slope = -scale * inverse * pulls[0]
    shift = -scale * pulls[1] - slope * mean
    scale, slope, shift = (_per_channel(factor.to(weight.dtype), x) for factor in (scale, slope, shift))
    wide, wide_grad = x.to(weight.dtype), grad.to(weight.dtype)  # rounded to 16 bits once, at the end
    dx = torch.addcmul(shift, wide, slope).addcmul_(wide_grad, scale)
    if valid is not None:
        dx = (wide_grad * scale).index_copy_(0, valid, dx.index_select(0, valid))
    return dx.to(x.dtype)


class _GlobalBatchNorm(torch.autograd.Function):
    """Normalise by the statistics of all ranks' valid rows. One all-reduce forward, one backward, whatever a rank holds.

    torch's SyncBatchNorm waits for the device in every layer, to leave out ranks without rows. Sums need no such care.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, valid_rows: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        sums = distributed.all_reduce_sum(_local_sums(x if valid_rows is None else x.index_select(0, valid_rows), weight))
        count = sums[-1].clamp(min=1)
        moments = sums[:-1].view(2, channels) / count
        moments[1].addcmul_(moments[0], moments[0], value=-1.0).clamp_(min=0)
        mean, variance = moments.to(weight.dtype)
        y = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, variance, count, valid_rows)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        ctx.set_materialize_grads(False)
        return y, mean, variance, sums[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, weight, mean, variance, count, valid_rows = ctx.saved_tensors
        # None where nothing depends on y; the other ranks wait for this one's sums all the same.
        grad, inverse = torch.zeros_like(x) if grads[0] is None else grads[0], (variance + ctx.eps).rsqrt()
        # In evaluation mode the native kernel gives sum(grad * normalised x) and sum(grad), over this rank's rows. It cannot have none.
        if len(x):
            _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, mean, variance, mean, inverse, False, ctx.eps, [False, True, True]
            )
        else:
            grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, grad_bias, None, None
        pulls = distributed.all_reduce_sum(torch.stack([grad_weight, grad_bias]).double()) / count
        return _input_gradient(grad, x, weight, mean, inverse, pulls, valid_rows), grad_weight, grad_bias, None, None


class _ConvertedBatchNorm(nn.BatchNorm2d):
    """Takes over the parameters and buffers of a BatchNorm and, of timm's BatchNormAct2d, the activation after it."""

    def __init__(self, source: _BatchNorm) -> None:
        super().__init__(source.num_features, eps=source.eps, momentum=0.1, affine=True)
        self.weight, self.bias = source.weight, source.bias
        self.running_mean, self.running_var = source.running_mean, source.running_var
        self.drop: nn.Module = getattr(source, "drop", nn.Identity())
        self.act: nn.Module = getattr(source, "act", nn.Identity())


class FrozenBatchNorm2d(_ConvertedBatchNorm):
    """BatchNorm whose running statistics never move, also in training; the affine parameters train. (B, C, ...) -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(self.drop(y))


class GlobalBatchNorm2d(_ConvertedBatchNorm):
    """BatchNorm with the statistics of the global batch: in training the gradient on W ranks equals the gradient on one.

    Rows that ``set_valid_rows`` flags invalid are normalised but enter no statistic. Statistics are fp32 whatever the
    input; momentum 0.1, unbiased running variance; evaluation uses the running statistics.
    """

    def __init__(self, source: _BatchNorm) -> None:
        super().__init__(source)
        self.valid_rows: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Collective in training mode, with gradient in the backward, too. (B, C, H, W) -> (B, C, H, W)."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        if not self.training:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            return self.act(self.drop(y))
        if distributed.world_size() == 1 and self.valid_rows is None and x.numel() > x.shape[1]:
            # The whole batch is here: torch's own kernels take the same statistics in fewer passes over x. They need two values a channel.
            self.num_batches_tracked += 1
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, self.eps)
            return self.act(self.drop(y))
        y, mean, variance, count = _GlobalBatchNorm.apply(x, self.weight, self.bias, self.valid_rows, self.eps)
        with torch.no_grad():
            # A step without a valid row anywhere has no statistics: it must not move the running ones.
            momentum = 0.1 * (count > 0).to(mean.dtype)
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(unbiased, momentum)
            self.num_batches_tracked += 1
        return self.act(self.drop(y))


def replace_batch_norm(module: nn.Module, kind: BatchNormKind) -> nn.Module:
    """The module with every BatchNorm inside turned into the frozen or the global kind (parameters and names are kept).

    Raises:
        InputError: a BatchNorm without scale or running statistics; for "global" also one over something else than images.
    """
    if isinstance(module, _BatchNorm):
        if not module.affine or not module.track_running_stats:
            raise InputError(
                f"model.batch_norm={kind} needs a scale and running statistics, which a {type(module).__name__} of this backbone has not; "
                "choose another model.backbone"
            )
        if kind == "frozen":
            return FrozenBatchNorm2d(module)
        if not isinstance(module, nn.BatchNorm2d):
            raise InputError(
                f"model.batch_norm=global handles BatchNorm2d only, but this backbone has a {type(module).__name__}; "
                "set model.batch_norm=frozen or choose another model.backbone"
            )
        return GlobalBatchNorm2d(module)
    for name, child in module.named_children():
        setattr(module, name, replace_batch_norm(child, kind))
    return module


def set_valid_rows(module: nn.Module, valid: Tensor | None) -> None:
    """Tell every global BatchNorm inside which rows of the coming batches count; None: all.

    Args:
        valid: (B,) bool, on the CPU, where nobody waits for a device to look at it.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, GlobalBatchNorm2d)]
    rows = None
    if layers and valid is not None and not bool(valid.all()):
        rows = to_device(valid.nonzero().flatten(), layers[0].weight.device)
    for layer in layers:
        layer.valid_rows = rows
