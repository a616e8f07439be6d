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
    return vector.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))


def _local_sums(x: Tensor, like: Tensor) -> Tensor:
    """(2C + 1,) float64: per channel the sum and the sum of squares of x (B, C, ...), and how many values a channel has."""
    count = x.numel() // x.shape[1]
    if count == 0:
        return x.new_zeros(2 * x.shape[1] + 1, dtype=torch.float64)
    # The kernel of F.batch_norm. It wants running statistics to update, and their dtype makes it return fp32 for bf16 input.
    mean, variance = (value.double() for value in torch.batch_norm_update_stats(x, torch.zeros_like(like), torch.ones_like(like), 0.0))
    # In float64 the sum of squares loses nothing that matters unless |mean| exceeds the deviation by some 1e6.
    return torch.cat([count * mean, count * (variance + mean * mean), mean.new_full((1,), count)])


class _GlobalBatchNorm(torch.autograd.Function):
    """Normalise by the statistics of all ranks' valid rows. One all-reduce forward, one backward, whatever a rank holds."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, valid_rows: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        sums = distributed.all_reduce_sum(_local_sums(x if valid_rows is None else x.index_select(0, valid_rows), weight))
        count = sums[-1].clamp(min=1)
        mean = sums[:channels] / count
        variance = (sums[channels:-1] / count - mean * mean).clamp(min=0)
        mean, variance = mean.to(weight.dtype), variance.to(weight.dtype)
        y = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, variance, count, valid_rows)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, sums[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, weight, mean, variance, count, valid_rows = ctx.saved_tensors
        grad = grads[0]
        inverse = (variance + ctx.eps).rsqrt()
        # In evaluation mode the native kernel gives sum(grad * normalised x) and sum(grad), over this rank's rows. It cannot have none.
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        if len(x):
            _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, mean, variance, mean, inverse, False, ctx.eps, [False, True, True]
            )
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, grad_bias, None, None
        # Every row's output moves with the statistics, and the statistics with every rank's valid rows:
        # dx = w / s * (dy - mean(dy) - normalised(x) * mean(dy * normalised(x))), the means over the global batch.
        total = distributed.all_reduce_sum(torch.cat([grad_weight, grad_bias]).double()) / count
        scale = (weight * inverse).double()
        slope = -scale * inverse * total[: len(mean)]
        shift = -scale * total[len(mean) :] - slope * mean
        scales = _per_channel(scale, x)
        grad_x = torch.addcmul(_per_channel(shift, x), x, _per_channel(slope, x)).addcmul_(grad, scales)
        if valid_rows is not None:  # the other rows are in no statistic: only the direct path
            direct = grad * scales
            grad_x = direct.index_copy_(0, valid_rows, grad_x.index_select(0, valid_rows))
        return grad_x, grad_weight, grad_bias, None, None


class _ConvertedBatchNorm(nn.BatchNorm2d):
    """Takes over the parameters and buffers of a BatchNorm and, of timm's BatchNormAct2d, the activation after it."""

    def __init__(self, source: _BatchNorm) -> None:
        super().__init__(source.num_features, eps=source.eps, momentum=0.1, affine=True)
        if source.affine:
            self.weight, self.bias = source.weight, source.bias
        if source.running_mean is not None and source.running_var is not None:
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
            unbiased = variance * (count / (count - 1).clamp(min=1)).to(mean.dtype)
            self.running_mean += momentum * (mean - self.running_mean)
            self.running_var += momentum * (unbiased - self.running_var)
            self.num_batches_tracked += 1
        return self.act(self.drop(y))


def replace_batch_norm(module: nn.Module, kind: BatchNormKind) -> nn.Module:
    """The module with every BatchNorm inside turned into the frozen or the global kind (parameters and names are kept).

    Raises:
        InputError: kind "global" and a BatchNorm over something else than images.
    """
    if isinstance(module, _BatchNorm):
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
