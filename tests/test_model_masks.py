"""Subspace masks: the hierarchy in one parameter, the penalty against the published values."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.model.masks import SubspaceMasks
from tests.rounding import EXACT

GOLDEN = Path(__file__).parent / "golden" / "reference_values.npz"


def make(kind: str | dict[str, Any], num_learners: int, embedding_dim: int) -> SubspaceMasks:
    masks: SubspaceMasks = parts.build("mask", kind, num_learners=num_learners, embedding_dim=embedding_dim)
    return masks


def _loss(level_masks: torch.Tensor, seed: int) -> torch.Tensor:
    """Another gradient for every learner, at every step."""
    weights = torch.randn(level_masks.shape, generator=torch.Generator().manual_seed(seed))
    return (level_masks.relu() * weights).sum() + SubspaceMasks.penalty(level_masks)


def test_leaves_move_as_one_parent_and_children_inherit_its_moments() -> None:
    masks = make("learned", 4, 12)
    optimizer = torch.optim.Adam(masks.parameters(), lr=0.01, weight_decay=1e-4)
    parents = torch.nn.Parameter(torch.ones(2, 12))
    parent_optimizer = torch.optim.Adam([parents], lr=0.01, weight_decay=1e-4)
    for step in range(6):
        optimizer.zero_grad()
        _loss(masks.level_masks(2), step).backward()
        optimizer.step()
        parent_optimizer.zero_grad()
        _loss(parents, step).backward()
        parent_optimizer.step()
    leaves = masks.masks.detach().view(2, 2, 12)
    assert torch.equal(leaves[:, 0], leaves[:, 1])
    assert torch.equal(leaves[:, 0], parents.detach())
    children = masks.level_masks(4)
    assert torch.equal(children, parents.detach().repeat_interleave(2, 0))
    moments = optimizer.state[masks.masks]["exp_avg"].view(2, 2, 12)
    assert torch.equal(moments[:, 0], moments[:, 1]) and torch.equal(moments[:, 0], parent_optimizer.state[parents]["exp_avg"])


def test_every_leaf_gets_the_full_gradient() -> None:
    masks = make("learned", 8, 5)
    weights = torch.randn(2, 5)
    (masks.level_masks(2) * weights).sum().backward()
    assert masks.masks.grad is not None
    assert torch.equal(masks.masks.grad, weights.repeat_interleave(4, 0))


@pytest.mark.parametrize("dim", [16, 19])
def test_fixed_masks_are_halved_at_every_split(dim: int) -> None:
    masks = make("fixed", 8, dim)
    assert not masks.masks.requires_grad and torch.equal(masks.level_masks(1), torch.ones(1, dim))
    for level in (1, 2, 4):
        parents, children = masks.level_masks(level), masks.level_masks(2 * level)
        assert torch.equal(children.view(level, 2, dim).sum(1), parents)
        assert float(SubspaceMasks.penalty(children)) == 0
    widths = masks.level_masks(8).sum(1)
    assert float(widths.max() - widths.min()) <= 1


def test_sliced_masks_are_flat() -> None:
    masks = make("sliced", 4, 8)
    assert torch.equal(masks.level_masks(4).nonzero()[:, 1], torch.arange(8))
    with pytest.raises(ValueError, match="no level 2"):
        masks.level_masks(2)
    with pytest.raises(InputError, match=r"model\.embedding_dim=100 .*multiple of 32"):
        make("sliced", 32, 100)
    with pytest.raises(InputError, match="without a coordinate"):
        make("fixed", 32, 16)


def test_penalty_and_gradient_have_the_published_values() -> None:
    golden = np.load(GOLDEN)
    masks = torch.from_numpy(golden["orthogonality_masks"]).requires_grad_()
    value = SubspaceMasks.penalty(masks)
    value.backward()
    assert masks.grad is not None
    assert value.item() == pytest.approx(float(golden["orthogonality_value"]), rel=1e-5)
    np.testing.assert_allclose(masks.grad.numpy(), golden["orthogonality_grad"], rtol=1e-5, atol=1e-7)


def test_penalty_is_finite_where_masks_vanish_and_zero_for_one() -> None:
    masks = torch.tensor([[0.0, 0.0], [-1.0, -2.0], [1.0, 0.5], [1e-30, 0.0]], requires_grad=True)
    value = SubspaceMasks.penalty(masks)
    value.backward()
    assert masks.grad is not None and bool(torch.isfinite(masks.grad).all()) and bool(torch.isfinite(value))
    alone = torch.randn(1, 4, requires_grad=True)
    assert SubspaceMasks.penalty(alone).item() == 0
    assert float(SubspaceMasks.sparsity(masks)) == 5 / 8


def test_the_penalty_does_not_separate_equal_masks() -> None:
    """It is at its maximum there, so its gradient is 0; beside it, as far as the masks are apart, and small: see docs/subspaces.md."""
    numbers = torch.Generator().manual_seed(0)
    learners, width = 4, 32
    equal = (1 + torch.rand(width, dtype=torch.float64, generator=numbers)).repeat(learners, 1).requires_grad_()
    value = SubspaceMasks.penalty(equal)
    (gradient,) = torch.autograd.grad(value, equal)
    assert value.item() == pytest.approx(1, rel=EXACT) and gradient.abs().max() < EXACT
    # Masks that differ by a little, at right angles to what they have in common.
    mean = equal.detach()[0]
    apart = torch.randn(learners, width, dtype=torch.float64, generator=numbers)
    apart -= apart.mean(0)
    apart -= (apart @ mean)[:, None] * mean / (mean @ mean)
    for small in (1e-2, 1e-3):
        masks = (mean + small * apart).requires_grad_()
        (gradient,) = torch.autograd.grad(SubspaceMasks.penalty(masks), masks)
        expected = -2 * small * apart / ((learners - 1) * (mean @ mean))
        # The next term of the series is smaller by another factor of what they are apart, relative to their length of about 8.
        assert (gradient - expected).norm() < 4 * small * expected.norm()


@pytest.mark.parametrize("scale", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("learners", [2, 8])
def test_children_differ_from_their_birth(scale: float, learners: int) -> None:
    masks = make({"name": "learned", "split_scale": scale}, learners, 24)
    assert masks.state_dict().keys() == {"masks"} and torch.equal(masks.masks.detach(), torch.ones(learners, 24))
    assert torch.equal(masks.level_masks(1), torch.ones(1, 24))
    level = 2
    while level <= learners:
        parents, children = masks.level_masks(level // 2).detach(), masks.level_masks(level).detach()
        # Each child has its parent's mask on one half of the coordinates, its sibling on the other.
        kept = children.view(-1, 2, 24) == parents[:, None]
        if scale:
            assert torch.equal(kept[:, 0], ~kept[:, 1])
            assert torch.equal(kept.sum(2), torch.full((level // 2, 2), 12))
        unit = torch.nn.functional.normalize(children, dim=1)
        once = 2 * scale / (1 + scale**2)
        for a, b in itertools.combinations(range(level), 2):
            # 1e-6: a sum of 24 products in fp32.
            assert float(unit[a] @ unit[b]) == pytest.approx(once ** (a ^ b).bit_count(), abs=1e-6)
        level *= 2
    if scale == 0:
        assert torch.equal(children.sum(0), torch.ones(24)) and float(SubspaceMasks.penalty(children)) == 0


def test_after_a_split_the_penalty_drives_children_apart_and_leaves_stay_equal() -> None:
    torch.manual_seed(0)
    found = {}
    for scale in (1.0, 0.5):
        masks = make({"name": "learned", "split_scale": scale}, 4, 16).double()
        optimizer = torch.optim.SGD(masks.parameters(), lr=1.0)
        for _ in range(100):
            optimizer.zero_grad()
            SubspaceMasks.penalty(masks.level_masks(2)).backward()
            optimizer.step()
        leaves = masks.masks.detach().view(2, 2, 16)
        assert torch.equal(leaves[:, 0], leaves[:, 1])
        found[scale] = float(SubspaceMasks.penalty(masks.level_masks(2).detach()))
    assert found[1.0] == pytest.approx(1, rel=EXACT)
    assert found[0.5] < 0.1  # it began at 0.8


def test_penalty_stays_fp32_under_autocast() -> None:
    masks = torch.rand(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            torch.equal(SubspaceMasks.penalty(masks), SubspaceMasks.penalty(masks.clone()))
            and SubspaceMasks.penalty(masks).dtype == torch.float32
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = SubspaceMasks.penalty(masks)
    assert torch.equal(inside, SubspaceMasks.penalty(masks))


@pytest.mark.parametrize("kind", ["learned", "sliced"])
def test_a_row_or_slice_of_zeros_gets_no_gradient(kind: str) -> None:
    """Nor one of 1e12, which would leave nothing of a clipped step; others are normalised as torch does it, bit for bit."""
    masks = parts.build("mask", kind, num_learners=4, embedding_dim=8)
    raw = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    pieces = raw.view(3, 4, 2) if kind == "sliced" else raw[:, None]
    expected = torch.nn.functional.normalize(pieces, dim=2).view(3, 8) / (2 if kind == "sliced" else 1)
    assert torch.equal(masks.whole(raw), expected)
    raw[1] = 0
    raw[2, 2:4] = 0
    raw.requires_grad_()
    weights = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((masks.whole(raw) * weights).sum(), raw)
    assert not masks.whole(raw)[1].any() and not gradient[1].any()
    assert bool(gradient[0].any()) and gradient.abs().max() < weights.abs().sum() / raw.detach().abs()[raw != 0].min()
    assert kind != "sliced" or not gradient[2, 2:4].any()
