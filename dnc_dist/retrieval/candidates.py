"""The nearest rows of a block by float32 distances, as candidates: by FAISS on the CPU, by products of torch on a GPU.

Whatever proposes, the exact search compares candidates again, and asks for more where float32 could have missed one
(``dnc_dist.retrieval.search``). So all it needs of a proposal is an error below ``gram_error``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import faiss
import numpy as np
import torch
from torch import Tensor

PRODUCT_ELEMENTS = 1 << 26
"""Bound on the distances of one product on a GPU: 256 MB."""

Propose = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""A block of rows (b, D) and k <= b -> of each query the k nearest rows of the block: squared distances (Q, k) float32, ascending, and
rows (Q, k) int64."""


def proposals(queries: np.ndarray, device: torch.device) -> Propose:
    """What proposes candidates for queries (Q, D) float32, on the device that this rank computes on."""
    if device.type == "cpu":
        return lambda block, k: faiss.knn(queries, block, k)
    return by_products(queries, device)


def by_products(queries: np.ndarray, device: torch.device) -> Propose:
    """``Propose`` by |q|² + |r|² - 2qr on any device.

    FAISS on a GPU takes 2048 neighbours at most, and its math mode is not ours to set; a product in full float32 is within ``gram_error``.
    """
    on_device = torch.from_numpy(queries).to(device)
    lengths = on_device.square().sum(1, keepdim=True)

    def propose(block: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        rows = torch.from_numpy(block).to(device)
        squares = rows.square().sum(1)
        step = max(1, PRODUCT_ELEMENTS // len(rows))
        found: list[tuple[Tensor, Tensor]] = []
        with _full_float32():
            for at in range(0, len(on_device), step):
                distance = torch.addmm(squares, on_device[at : at + step], rows.T, alpha=-2).add_(lengths[at : at + step])
                found.append(tuple(distance.topk(k, dim=1, largest=False)))  # type: ignore[arg-type]
        distances, numbers = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        return distances, numbers

    return propose


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 in products, whatever the program around has chosen: it keeps 11 bits of a factor."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
