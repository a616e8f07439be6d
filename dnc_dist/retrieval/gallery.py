"""The gallery rows of one rank: in an order that no rank decides, and less their centre, for approximate distances."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK_ELEMENTS = 1 << 20
"""Bound on the copies (rows x D) of one block of rows."""


def squares(vectors: np.ndarray) -> np.ndarray:
    """(n,) float64 squared lengths of float32 rows (n, D)."""
    return np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)


class Gallery:
    """The rows (n, D) of one rank whose ids (n,) are not -1, in the order of their ids: neither the order of the ranks nor that within
    a rank must matter."""

    def __init__(self, vectors: np.ndarray, ids: np.ndarray) -> None:
        order = np.argsort(ids)
        self.vectors, self.at = vectors, order[ids[order] >= 0]
        self.ids = ids[self.at]
        # Close together and far from 0, vectors differ in few digits: candidates are looked for among centred ones.
        self.centre = np.zeros(vectors.shape[1], np.float32)
        sums = [block.sum(0, dtype=np.float64) for _, block in self.centred_blocks()]
        self.centre = (np.sum(sums, 0) / len(self.ids)).astype(np.float32) if sums else self.centre
        self.square = np.concatenate([np.empty(0), *(squares(block) for _, block in self.centred_blocks())])
        self.longest = float(self.square.max(initial=0)) ** 0.5

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, which: np.ndarray | slice) -> np.ndarray:
        """(…, D) copies of some rows, by their place in the order."""
        return self.vectors[self.at[which]]

    def centred_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All rows less the centre, a block (b, D) after the other, each with the place of its first row."""
        step = max(1, BLOCK_ELEMENTS // self.vectors.shape[1])
        for at in range(0, len(self), step):
            block = self.rows(slice(at, at + step))
            block -= self.centre
            yield at, block


def first_columns(rows: np.ndarray, distance: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k columns of each line by (distance, row); unused entries hold distance inf."""
    order = np.lexsort((rows, distance), axis=1)[:, :k]
    return np.take_along_axis(rows, order, 1), np.take_along_axis(distance, order, 1)
