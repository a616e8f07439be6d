"""The features of a large batch on a small memory, with their exact gradient (Gao et al., GradCache, RepL4NLP 2021).

A loss over pairs needs the features of all rows at once, but not what a network stores for its backward pass. So the rows go
through the network in chunks without a graph, and only the features are kept. In the backward pass each chunk is computed once
more, with the same random numbers, and differentiated at once: one forward pass more, and the memory of one chunk.

The chunks are one node of the graph. A parameter receives one gradient, the sum over chunks, as it does without chunks. Whoever
waits for gradients, as ZeRO does to reduce them, sees no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dnc_dist.base.errors import InputError
from dnc_dist.model.batch_norm import GlobalBatchNorm2d
from dnc_dist.processes import distributed


def check_chunks(backbone: nn.Module, chunks: int, batch_norm: str) -> None:
    """Refuse chunks for a network whose rows depend on each other.

    Args:
        backbone: the network, as it is trained.
        chunks: the value of ``engine.grad_cache_chunks``.
        batch_norm: the value of ``model.batch_norm``, for the message.

    Raises:
        InputError: it normalises by the statistics of the whole batch.
    """
    if chunks > 1 and any(isinstance(layer, GlobalBatchNorm2d) for layer in backbone.modules()):
        meaning = ", which is global without model.weights," if batch_norm == "auto" else ""
        raise InputError(
            f"engine.grad_cache_chunks={chunks} computes a batch in parts, but model.batch_norm={batch_norm}{meaning} needs statistics of "
            "the whole batch at once; set engine.grad_cache_chunks=1, or model.batch_norm=frozen with model.weights, or choose a "
            "model.backbone without BatchNorm"
        )


def in_chunks(compute: Callable[..., Tensor], rows: Sequence[Tensor | None], chunks: int, network: nn.Module) -> Tensor:
    """The results of rows, computed in consecutive chunks, with exact gradients for the parameters of the network alone.

    Args:
        compute: results (b, F) of some rows; each row by itself. What it needs of autocast it enters itself, and it is not called
            inside of another one, which would keep weights that were cast without a graph.
        rows: its arguments, tensors (B, ...) or None; they get no gradient.
        chunks: how many, or B, if that is fewer.
        network: whose parameters ``compute`` uses.

    Returns:
        (B, F)

    Raises:
        InputError: computing changes a buffer of the network: other chunks, and the second pass, would find another network.
    """
    count = min(chunks, max(len(value) for value in rows if value is not None))
    parts = [[None] * count if value is None else value.tensor_split(count) for value in rows]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    before = [(buffer, buffer._version) for buffer in network.buffers()]
    results: Tensor = _InChunks.apply(compute, list(zip(*parts, strict=True)), *trained)
    for (name, buffer), (earlier, version) in zip(network.named_buffers(), before, strict=True):
        if buffer is not earlier or buffer._version != version:
            raise InputError(
                f"engine.grad_cache_chunks={chunks} computes a batch in parts, and each of them twice, but every pass changes {name} of "
                "the backbone; set engine.grad_cache_chunks=1 or choose another model.backbone"
            )
    return results


class _Numbers(NamedTuple):
    """The state of the generators that layers of other libraries draw from."""

    cpu: Tensor
    device: Tensor | None

    @classmethod
    def now(cls) -> _Numbers:
        device = distributed.device()
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, distributed.device())


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], chunks: Sequence[tuple[Tensor | None, ...]], *trained: Tensor) -> Tensor:
        ctx.compute, ctx.chunks, ctx.numbers = compute, chunks, []
        # Saved, so that a change of a parameter before the backward pass is an error.
        ctx.save_for_backward(*trained)
        results = []
        for chunk in chunks:
            ctx.numbers.append(_Numbers.now())
            results.append(compute(*chunk))
        ctx.sizes = [len(result) for result in results]
        return torch.cat(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        trained, after = ctx.saved_tensors, _Numbers.now()
        sums: list[Tensor | None] = [None] * len(trained)
        for chunk, numbers, grad in zip(ctx.chunks, ctx.numbers, grads[0].split(ctx.sizes), strict=True):
            numbers.restore()
            with torch.enable_grad():
                result = ctx.compute(*chunk)
            # Returned, not added to the fields `grad`: whoever waits for gradients there sees only the sums.
            for number, part in enumerate(torch.autograd.grad(result, trained, grad, allow_unused=True)):
                before = sums[number]
                sums[number] = part if before is None else before if part is None else before + part
        after.restore()
        # A parameter that takes part in nothing: hooks are called for it all the same, and those of ZeRO want a tensor. Zeros are what
        # DeepSpeed puts in place of a missing gradient, too.
        return None, None, *(torch.zeros_like(value) if total is None else total for value, total in zip(trained, sums, strict=True))
