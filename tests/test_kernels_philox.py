"""Philox 4x32-10 against the vectors published with Random123, and the layout of the draws."""

from __future__ import annotations

import pytest
import torch

from dnc_kernels.philox import draw_words, exponentials, philox4x32

FULL = 0xFFFFFFFF
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL, FULL, FULL, FULL), (FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_known_vectors(counter, key, expected):
    assert tuple(int(word) for word in philox4x32(counter, key)) == expected


@pytest.mark.parametrize("num_positions", [1, 3, 64, 65, 200, 256, 257, 700])
def test_positions_map_to_counter_and_lane_in_blocks_of_256(num_positions):
    seed, step, row_ids = (7 << 32) + 5, 11, torch.tensor([3, (2 << 32) + 9])
    words = draw_words(row_ids, num_positions, seed, step)
    assert words.shape == (2, num_positions)
    for anchor, (low, high) in enumerate([(3, 0), (9, 2)]):
        for position in {0, num_positions // 2, num_positions - 1}:
            block, within = divmod(position, 256)
            outputs = philox4x32((64 * block + within % 64, low, high, step), (5, 7))
            assert int(words[anchor, position]) == int(outputs[within // 64])


def test_seed_and_step_may_be_tensors():
    row_ids = torch.arange(4)
    as_tensor = draw_words(row_ids, 100, torch.tensor(2**62 + 17), torch.tensor(5))
    assert torch.equal(as_tensor, draw_words(row_ids, 100, 2**62 + 17, 5))
    assert not torch.equal(as_tensor, draw_words(row_ids, 100, 2**62 + 17, 6))


def test_exponentials_are_exponential_and_fine_near_zero():
    draws = exponentials(draw_words(torch.arange(400), 500, 1, 2))
    assert abs(float(draws.mean()) - 1) < 0.01 and abs(float(draws.var()) - 1) < 0.03
    smallest, largest = exponentials(torch.tensor([0, FULL]))
    assert float(smallest) == pytest.approx(2.0**-33) and torch.isfinite(largest)
