"""One pass over a view: features or embeddings of this rank's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dnc_dist.base.errors import Stopped
from dnc_dist.base.progress import Progress
from dnc_dist.data.stream import SequentialBatches
from dnc_dist.engine.network import EmbeddingNetwork
from dnc_dist.processes import distributed, watchdog
from dnc_dist.processes.signals import StopRequest

VOTE_EVERY_BLOCKS = 8


class Extracted(NamedTuple):
    """What one rank has of a view: consecutive places from ``start`` on.

    ``values`` (n, D) float32 on the CPU, zeros where ``valid`` (n,) is False because the row could not be decoded.
    """

    values: Tensor
    valid: Tensor
    start: int
    failed: list[str]


def extract(
    network: EmbeddingNetwork,
    compute: Callable[[Tensor], Tensor],
    batches: SequentialBatches,
    *,
    name: str,
    num_rows: int,
    stop: StopRequest,
    progress: Progress,
) -> Extracted:
    """Collective. Run ``compute`` (``network.features`` or ``.embeddings``) over this rank's blocks of a view.

    Raises:
        Stopped: a rank was asked to stop; all ranks agree on it every few blocks and abandon the pass together.
    """
    start, end = batches.bounds
    device = distributed.device()
    values: Tensor | None = None
    valid = torch.zeros(end - start, dtype=torch.bool)
    failed: list[str] = []
    seen = 0
    # Ranks differ in their number of blocks but must vote equally often.
    rounds = max(distributed.gather_objects(len(batches))) // VOTE_EVERY_BLOCKS + 1
    was_training = network.training
    network.eval()
    watchdog.phase(f"{name}, first block")
    pending = iter(batches)
    with torch.inference_mode(), progress.phase(name, num_rows, "img") as phase:
        for _ in range(rounds):
            for _ in range(VOTE_EVERY_BLOCKS):
                block = next(pending, None)
                if block is None:
                    break
                result = compute(block.images.to(device, non_blocking=True)).float().cpu()
                if values is None:
                    # Tensors made in inference mode cannot take part in autograd later.
                    with torch.inference_mode(False):
                        values = torch.zeros(end - start, result.shape[1])
                at = block.places - start
                # Not a product: what the network makes of no image may be NaN.
                values[at], valid[at] = result.masked_fill(~block.valid[:, None], 0.0), block.valid
                failed += block.failed
                # Of the other ranks it is only known that they do about as much.
                advance = min(len(at) * distributed.world_size(), num_rows - seen)
                seen += advance
                phase.update(advance)
                watchdog.beat(f"{name}, block {block.number}")
            if distributed.any_rank(stop.requested):
                raise Stopped(f"during {name}")
        phase.update(num_rows - seen)
    network.train(was_training)
    watchdog.phase(f"{name}, all blocks")
    if values is None:
        values = torch.zeros(0, _width(network, compute))
    return Extracted(values, valid, start, failed)


def _width(network: EmbeddingNetwork, compute: Callable[[Tensor], Tensor]) -> int:
    """Columns that ``compute`` would give, for a rank without rows."""
    return network.head.linear.in_features if compute == network.features else network.masks.embedding_dim
