"""How far rounding may take a result: from arguments, never from what one machine printed.

Two computations of one thing in fp32 differ by rounding: other sums on another number of processes, other instructions on another
processor. What that may do to a result is bounded in one of these ways, the first that serves:

1. ``EXACT``: both compute in float64. A sum of n terms is then wrong by n * 1e-16 relative to its terms, 1e-10 for a million of
   them, whatever order they are added in; and a distance lies within that of a boundary, or of another one, in no test.
   A real mistake (a lost row, a factor, a sign) moves what is compared by its size on any scale.
2. ``parity.limit``: one computation in fp32 against float64 tells what rounding does to this problem on this processor; two
   in fp32 may differ by a few times as much.
3. ``share_of_course``: a training passes rounding on, and enlarges it. So a *neighbour* is trained along, with weights moved by
   ``NEIGHBOUR`` at the start, more than a step's rounding moves them: who differs by rounding only stays as close as the neighbour.
   That holds on a smooth network (see ``doctor.harness.smooth``): where rounding turns a ReLU on or off, the distance jumps.
4. Absolute beside relative: a difference of numbers of size s is wrong by eps * s, however small the difference is.

Choices (nearest, drawn, best) are compared where rounding does not decide them, see the tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

EPS = torch.finfo(torch.float32).eps
EXACT = 1e-9
NEIGHBOUR = 16 * EPS
TIMES = 4.0
"""As far as the neighbour got, so often: its weights were moved at random, by luck not in the worst direction."""


def move_weights(module: nn.Module, by: float = NEIGHBOUR) -> None:
    """Move every parameter by a random part of itself of this size, the same on every rank."""
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in module.parameters():
            value.mul_(1 + by * torch.randn(value.shape, generator=numbers))


def share_of_course(found: Sequence[float], expected: Sequence[float], neighbour: Sequence[float], least_steps: int = 5) -> float:
    """The largest share of what rounding allows by which the losses of a training differ from the expected ones; inf for a NaN.

    Allowed is in each step ``TIMES`` the distance that the neighbour has reached so far, and ``NEIGHBOUR`` of the largest loss.

    Steps count until the neighbour has gone astray: from there on a real mistake could pass, and one lost row changes losses by
    several per cent. When that happens depends on the processor.

    Raises:
        AssertionError: it happens in the first ``least_steps`` steps.
    """
    assert len(found) == len(expected) == len(neighbour) > 0
    reached, share = 0.0, 0.0
    for step, (ours, theirs, other) in enumerate(zip(found, expected, neighbour, strict=True)):
        reached = max(reached, abs(other - theirs))
        if reached >= 1e-3 * max(expected):
            assert step >= least_steps, "a chaotic training proves nothing"
            break
        used = abs(ours - theirs) / (TIMES * reached + NEIGHBOUR * max(expected))
        share = max(share, used if used == used else float("inf"))
    return share
