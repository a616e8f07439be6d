"""Philox 4x32-10 (Salmon et al., SC 2011) in int64 tensors, and the draws of the sampling contract.

The draw of anchor row r for the negative at position p is a pure function of (seed, r, p, step):

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (64 * (p // 256) + (p % 256) % 64, r low, r high, step low 32 bits)
    lane    = (p % 256) // 64            which of the four 32-bit outputs

so one block of 256 positions costs 64 evaluations. Position p counts the rows of the anchor's learner among the
references in (label, row id) order, from 0. Ranks, row order and tiles change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
LOW_32 = 0xFFFFFFFF
BLOCK, LANES = 256, 4
PER_LANE = BLOCK // LANES

Word = Tensor | int


def philox4x32(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four outputs in [0, 2**32) as int64 tensors; counter and key words are int64 in [0, 2**32) that broadcast."""
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64) for word in counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2**64, so both halves are those of the unsigned product after masking. A low half is masked
        # where it is used, together with the high half of the other product.
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0 = _xor(product_1 >> 32, c1).bitwise_xor_(k0).bitwise_and_(LOW_32)
        c2 = _xor(product_0 >> 32, c3).bitwise_xor_(k1).bitwise_and_(LOW_32)
        c1, c3 = product_1, product_0
        k0, k1 = (k0 + WEYL_0) & LOW_32, (k1 + WEYL_1) & LOW_32
    return c0, c1 & LOW_32, c2, c3 & LOW_32


def _xor(own: Tensor, other: Tensor) -> Tensor:
    """own ^ other, in the memory of `own` where it is large enough."""
    return own.bitwise_xor_(other) if own.shape == other.shape else own ^ other


def draw_words(row_ids: Tensor, num_positions: int, seed: Word, step: Word) -> Tensor:
    """The 32-bit draws of each anchor for positions 0 … num_positions-1, (B, num_positions) int64; row_ids (B,) int64."""
    # As numbers they cost nothing; a value on a GPU would be waited for.
    seed, step = (int(word) if isinstance(word, Tensor) and word.device.type == "cpu" else word for word in (seed, step))
    blocks = -(-num_positions // BLOCK)
    counters = torch.arange(min(blocks * PER_LANE, num_positions), device=row_ids.device)
    ids = row_ids[:, None]
    words = philox4x32(
        (counters[None, :], ids & LOW_32, (ids >> 32) & LOW_32, step & LOW_32),
        (seed & LOW_32, (seed >> 32) & LOW_32),
    )
    if num_positions <= PER_LANE:  # only lane 0 is in use
        return words[0]
    lanes = torch.stack([word.view(-1, blocks, PER_LANE) for word in words], dim=2)  # (B, blocks, 4, 64)
    return lanes.view(row_ids.shape[0], blocks * BLOCK)[:, :num_positions]


def exponentials(words: Tensor) -> Tensor:
    """Exponential(1) draws in float64 from 32-bit words.

    E = -log(1 - v) with v = (word + 1/2) / 2**32 is fine near 0, and small E are the ones that win the race
    log w - log E; the usual Gumbel form -log(-log u) has its coarse steps exactly there.
    """
    return words.double().add_(0.5).mul_(-(2.0**-32)).log1p_().mul_(-1.0)  # neg_ takes five times as long on a CPU
