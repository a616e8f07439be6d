"""Float32 products of the search: by NumPy and FAISS on the CPU, by torch on a GPU.

They only say which pairs matter. What they leave in doubt, by ``gram_error``, is computed again in float64 on the CPU. So all that is asked
of a product is an error below that bound, and no digit of a result depends on who computed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import faiss
import numpy as np
import torch
from torch import Tensor

TILE = 1024
"""Rows on each side of one product on the CPU; on a GPU four times as many, as it needs time to begin."""

CANDIDATES_ELEMENTS = 1 << 26
"""Bound on the distances of which a GPU takes the smallest ones: 256 MB."""

Propose = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""A block of rows (b, D) and k <= b -> of each query the k nearest rows of the block: squared distances (Q, k) float32, ascending, and
rows (Q, k) int64."""


class NumPyProducts:
    """Tiles of distances on the CPU, in memory that is used again."""

    keeps = False
    """Whether factors stay loaded: rows that are in memory anyway are not copied for good."""

    def __init__(self) -> None:
        self.tile = TILE
        self._product = torch.empty(self.tile**2)
        self._within = torch.empty(self.tile**2, dtype=torch.bool)

    def load(self, factors: np.ndarray) -> Tensor:
        """Factors (n, F) float32, where ``distances`` wants them."""
        return torch.from_numpy(factors)

    def distances(self, left: Tensor, right: Tensor) -> Tensor:
        """(q, r) products of loaded factors; valid until the next call."""
        product = self._product[: len(left) * len(right)].view(len(left), len(right))
        # By NumPy: torch may have been told that products need not have the digits of float32.
        np.matmul(left.numpy(), right.numpy().T, out=product.numpy())
        return product

    def within(self, product: Tensor, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places (h,) in the flat product, ascending, where it is at most ``limit`` (broadcast against it), and the numbers there."""
        within = torch.le(product, torch.from_numpy(limit), out=self._within[: product.numel()].view(product.shape))
        places = np.flatnonzero(within.numpy())
        return places, product.numpy().ravel()[places]


class TorchProducts:
    """The same on any device of torch. Rows are loaded once, as they would have to travel again for every tile."""

    keeps = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.tile = 4 * TILE

    def load(self, factors: np.ndarray) -> Tensor:
        """Factors (n, F) float32, on the device."""
        return torch.from_numpy(factors).to(self._device)

    def distances(self, left: Tensor, right: Tensor) -> Tensor:
        """(q, r) products of loaded factors."""
        with _full_float32():
            return left @ right.T

    def within(self, product: Tensor, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places (h,) in the flat product, ascending, where it is at most ``limit`` (broadcast against it), and the numbers there."""
        places = (product <= torch.from_numpy(limit).to(self._device)).flatten().nonzero().flatten()
        return places.cpu().numpy(), product.flatten()[places].cpu().numpy()


def products_on(device: torch.device) -> NumPyProducts | TorchProducts:
    """What multiplies for a rank that computes on this device."""
    return NumPyProducts() if device.type == "cpu" else TorchProducts(device)


def proposals(queries: np.ndarray, device: torch.device) -> Propose:
    """What proposes candidates for queries (Q, D) float32, for a rank that computes on this device."""
    if device.type == "cpu":
        return lambda block, k: faiss.knn(queries, block, k)
    return propose_by_products(queries, device)


def propose_by_products(queries: np.ndarray, device: torch.device) -> Propose:
    """``Propose`` by |q|² + |r|² - 2qr on any device.

    FAISS on a GPU would take 2048 neighbours at most, and how exact its products are is not ours to set.
    """
    loaded = torch.from_numpy(queries).to(device)
    lengths = loaded.square().sum(1, keepdim=True)

    def propose(block: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        rows = torch.from_numpy(block).to(device)
        squares = rows.square().sum(1)
        step = max(1, CANDIDATES_ELEMENTS // len(rows))
        found: list[tuple[Tensor, Tensor]] = []
        with _full_float32():
            for at in range(0, len(loaded), step):
                distance = torch.addmm(squares, loaded[at : at + step], rows.T, alpha=-2).add_(lengths[at : at + step])
                found.append(tuple(distance.topk(k, dim=1, largest=False)))  # type: ignore[arg-type]
        distances, numbers = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        return distances, numbers

    return propose


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 in products, whatever the program around has chosen: it keeps 11 bits of a factor."""
    matmul = torch.backends.cuda.matmul
    # Not `allow_tf32`, which raises where the program has chosen by this newer name.
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
