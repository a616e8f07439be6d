"""Subspace masks: the hierarchy in one parameter, the penalty against the published values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.model.masks import SubspaceMasks

GOLDEN = Path(__file__).parent / "golden" / "reference_values.npz"


def make(kind: str, num_learners: int, embedding_dim: int) -> SubspaceMasks:
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
