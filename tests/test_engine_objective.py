"""What one step computes, against oracles written from the formulas: one process, no DeepSpeed, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import ProxyAnchorLoss
from torch import Tensor
from torch.nn import functional

import dnc_kernels
from dnc_dist.config import RunConfig
from dnc_dist.data.loading import Batch
from dnc_dist.doctor.harness import in_double, shake
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.objective import DncObjective
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_objective, parameter_groups
from tests.engine_fixtures import config, division_by_hand, make_dataset
from tests.rounding import EXACT

STEP = 5
PROXY = {"name": "proxy_anchor"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("objective"))


def prepare(root: Path, level: int, **changes: dict[str, Any]) -> tuple[RunConfig, DncObjective, Batch]:
    """A configuration, the objective in float64 and training mode, and the first batch of an epoch."""
    cfg = config(root, root / "run", **changes)
    data = RunData(cfg)
    objective = build_objective(cfg, data.train.num_classes).train()
    shake(objective, level, torch.Generator().manual_seed(11))
    in_double(objective)
    schedule = data.schedule(division_by_hand(data.train.labels, level), 0, conquer=False)
    return cfg, objective, next(data.train_batches(schedule, first_step=STEP, skip=0))


def raw_embeddings(objective: DncObjective, batch: Batch) -> Tensor:
    return objective.head(objective.backbone(objective.augment(batch.images)))


def gradients(objective: DncObjective, loss: Tensor) -> list[Tensor]:
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(value) if grad is None else grad for value, grad in zip(parameters, grads, strict=True)]


@pytest.mark.parametrize(("level", "m"), [(1, 1), (2, 2), (4, 1), (4, 2)])
def test_pairwise_loss_is_the_mean_over_learners_plus_penalty(root: Path, level: int, m: int) -> None:
    cfg, objective, batch = prepare(root, level, division={"learners_per_step": m}, loss={"learn_beta": "class"})
    loss, stats = objective(batch, Phase(STEP, level, conquer=False, backbone_frozen=False))

    embeddings, masks = raw_embeddings(objective, batch), objective.masks.masks[:: 4 // level]
    terms = []
    for a in batch.learner.unique().tolist():
        rows = batch.learner == a
        z = functional.normalize(embeddings[rows] * masks[a].relu(), dim=1)
        out = dnc_kernels.margin_loss(
            dnc_kernels.Rows(z, batch.labels[rows], row_ids=batch.rows[rows]),
            beta=objective.loss.beta,
            sampling=dnc_kernels.Sampling(seed=objective.seed, step=STEP),
        )
        assert out.num_active > 0
        terms.append(out.loss_sum / out.num_active)
        assert stats["learner_loss"][a] == pytest.approx(terms[-1].item(), rel=EXACT)
    assert len(terms) == m
    assert int(stats["learner_loss"].isfinite().sum()) == m
    unit = functional.normalize(masks.relu(), dim=1)
    cosines = [unit[a] @ unit[b] for a in range(level) for b in range(level) if a != b]
    penalty = torch.stack(cosines).mean() if cosines else torch.tensor(0.0)
    expected = torch.stack(terms).mean() + cfg.division.mask_penalty * penalty
    torch.testing.assert_close(loss, expected, rtol=EXACT, atol=0)
    assert stats["loss"] == pytest.approx(torch.stack(terms).mean().item(), rel=EXACT)
    assert stats["mask_orthogonality"] == pytest.approx(penalty.item(), rel=EXACT)
    assert stats["mask_sparsity"] == pytest.approx((masks <= 0).float().mean().item())


@pytest.mark.parametrize("norm", ["frozen", "global"])
def test_whole_batch_loss_equals_pytorch_metric_learning(root: Path, norm: str) -> None:
    _, objective, batch = prepare(root, 1, loss=PROXY, model={"batch_norm": norm})
    loss, stats = objective(batch, Phase(STEP, 1, conquer=True, backbone_frozen=False))
    found = gradients(objective, loss)

    oracle = ProxyAnchorLoss(len(objective.loss.proxies), objective.masks.embedding_dim, margin=0.1, alpha=32)
    oracle.proxies = objective.loss.proxies
    expected = oracle(raw_embeddings(objective, batch), batch.labels)
    torch.testing.assert_close(loss, expected, rtol=EXACT, atol=0)
    assert stats["loss"] == pytest.approx(expected.item(), rel=EXACT)
    for left, right in zip(found, gradients(objective, expected), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=EXACT * float(right.abs().max()))


def test_whole_batch_loss_of_masked_learners_is_their_mean(root: Path) -> None:
    cfg, objective, batch = prepare(root, 4, loss=PROXY, division={"learners_per_step": 2})
    loss, _ = objective(batch, Phase(STEP, 4, conquer=False, backbone_frozen=False))
    embeddings, masks = raw_embeddings(objective, batch), objective.masks.masks.relu()
    learners = batch.learner.unique().tolist()
    terms = []
    for a in learners:
        oracle = ProxyAnchorLoss(len(objective.loss.proxies), objective.masks.embedding_dim, margin=0.1, alpha=32)
        oracle.proxies = torch.nn.Parameter(objective.loss.proxies * masks[a])
        rows = batch.learner == a
        terms.append(oracle(embeddings[rows] * masks[a], batch.labels[rows]))
    assert len(terms) == 2
    penalty = objective.masks.penalty(objective.masks.masks)
    torch.testing.assert_close(loss, torch.stack(terms).mean() + cfg.division.mask_penalty * penalty, rtol=EXACT, atol=0)


@pytest.mark.parametrize("loss", [{}, PROXY])
def test_frozen_backbone_has_no_gradient_and_the_rest_has(root: Path, loss: dict[str, Any]) -> None:
    _, objective, batch = prepare(root, 4, loss=loss)
    frozen, _ = objective(batch, Phase(STEP, 4, conquer=False, backbone_frozen=True))
    frozen.backward()
    assert all(parameter.grad is None for parameter in objective.backbone.parameters())
    kept = [objective.head.linear.weight.grad, objective.masks.masks.grad]
    objective.zero_grad()
    moving, _ = objective(batch, Phase(STEP, 4, conquer=False, backbone_frozen=False))
    moving.backward()
    # Not bit for bit: a library may choose another algorithm where no gradient is wanted.
    torch.testing.assert_close(frozen, moving, rtol=EXACT, atol=0)
    for before, after in zip(kept, [objective.head.linear.weight.grad, objective.masks.masks.grad], strict=True):
        assert before is not None and after is not None and before.any()
        torch.testing.assert_close(before, after, rtol=0, atol=EXACT * float(after.abs().max()))


@pytest.mark.parametrize("loss", [{}, PROXY])
def test_an_undecodable_image_counts_as_if_it_were_not_there(root: Path, loss: dict[str, Any]) -> None:
    _, objective, batch = prepare(root, 4, loss=loss)
    assert batch.learner.unique().numel() == 1
    # Of a later learner: learner 0 must not be taken for one that is present.
    batch = batch._replace(learner=torch.full_like(batch.learner, 2))
    broken = torch.zeros_like(batch.valid)
    broken[[3, 7]] = True
    with_broken = batch._replace(valid=~broken, learner=torch.where(broken, -1, batch.learner))
    without = batch._replace(**{name: getattr(batch, name)[~broken] for name in ("images", "labels", "learner", "rows", "slots", "valid")})
    phase = Phase(STEP, 4, conquer=False, backbone_frozen=False)
    (found, stats), (expected, oracle) = objective(with_broken, phase), objective(without, phase)
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=0)
    assert stats["loss"] == pytest.approx(oracle["loss"].item(), rel=EXACT)
    assert stats["learner_loss"].isfinite().tolist() == [False, False, True, False]


@pytest.mark.parametrize("kind", ["learned", "fixed", "sliced"])
def test_conquer_trains_the_whole_embedding_without_masks(root: Path, kind: str) -> None:
    changes: dict[str, Any] = {"model": {"masks": kind}, "division": {"mode": "flat"}}
    _, objective, batch = prepare(root, 4, **changes)
    loss, stats = objective(batch, Phase(STEP, 4, conquer=True, backbone_frozen=False))
    loss.backward()
    assert objective.masks.masks.grad is None
    assert "mask_orthogonality" not in stats
    # Training sees the unit vectors that retrieval compares.
    z = objective.masks.whole(raw_embeddings(objective, batch))
    out = dnc_kernels.margin_loss(
        dnc_kernels.Rows(z, batch.labels, row_ids=batch.rows),
        beta=objective.loss.beta,
        sampling=dnc_kernels.Sampling(seed=objective.seed, step=STEP),
    )
    torch.testing.assert_close(loss, out.loss_sum / out.num_active, rtol=EXACT, atol=0)


def test_dropout_and_augmentation_depend_on_step_and_position_only(root: Path) -> None:
    _, objective, batch = prepare(root, 1, model={"dropout": 0.5}, data={"augment": "color"})

    def loss(step: int, batch: Batch) -> float:
        torch.rand(1)  # the state of the global generator must not matter
        return objective(batch, Phase(step, 1, conquer=True, backbone_frozen=True))[0].item()

    first = loss(1, batch)
    assert loss(1, batch) == first
    assert loss(2, batch) != first
    assert loss(1, batch._replace(slots=batch.slots + 1)) != first


def test_every_trained_parameter_is_in_one_group(root: Path) -> None:
    for changes in ({}, {"loss": {"learn_beta": "scalar"}}, {"loss": PROXY}, {"model": {"masks": "fixed"}}):
        _, objective, _ = prepare(root, 1, **changes)
        groups = {group["name"]: group for group in parameter_groups(objective, weight_decay=0.5)}
        members = [id(parameter) for group in groups.values() for parameter in group["params"]]
        assert sorted(members) == sorted(id(parameter) for parameter in objective.parameters() if parameter.requires_grad)
        assert [groups[name]["weight_decay"] for name in groups] == [0.5 if name in ("backbone", "embedding") else 0.0 for name in groups]
        norms = [value for name, value in objective.backbone.named_parameters() if value.dim() == 1]
        assert norms and {id(value) for value in norms} <= {id(value) for value in groups["backbone"]["params"]}


def test_same_weights_for_the_same_seed(root: Path) -> None:
    one, other = (prepare(root, 1)[1].state_dict() for _ in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    reseeded = prepare(root, 1, run={"seed": 4})[1].state_dict()
    assert not torch.equal(one["head.linear.weight"], reseeded["head.linear.weight"])


def test_features_and_embeddings_are_unit_rows(root: Path) -> None:
    _, objective, batch = prepare(root, 1)
    objective.eval()
    with torch.inference_mode():
        for values, width in ((objective.features(batch.images), 256), (objective.embeddings(batch.images), 16)):
            assert values.shape == (24, width)
            np.testing.assert_allclose(values.norm(dim=1), 1, rtol=1e-5)
