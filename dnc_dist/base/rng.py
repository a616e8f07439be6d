"""Random numbers keyed by what they are for, never by rank, worker or loading order (nothing to store, nothing to restore)."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def seed_for(*key: int | str) -> int:
    """A stable 63-bit seed for a key such as ``(seed, "crop", step)``; equal on every machine and Python version."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the key."""
    return torch.Generator().manual_seed(seed_for(*key))


def numpy_generator(*key: int | str) -> np.random.Generator:
    """A NumPy generator seeded by the key."""
    return np.random.Generator(np.random.Philox(seed_for(*key)))


def uniform(key: tuple[int | str, ...], positions: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1) that depend on the key and the position alone.

    Args:
        key: what the numbers are for.
        positions: (n,) int64, for example a row's slot in the step's global batch.
        count: numbers per position.

    Returns:
        (n, count) float32 on the CPU; row i is the same whichever other positions are asked for.
    """
    seed = seed_for(*key)
    rows = [np.random.Generator(np.random.Philox(key=[seed, int(position)])).random(count, dtype=np.float32) for position in positions]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, count)
