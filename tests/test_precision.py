"""Under bf16 autocast only the backbone computes in bf16: the embedding layer gives the fp32 product of its features, everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnc_dist.embedder import Embedder, Exported
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.network import EmbeddingNetwork
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_objective
from dnc_dist.model.embedding import EmbeddingHead
from tests.engine_fixtures import config, division_by_hand, make_dataset

LEVEL = 4
BF16: dict[str, dict[str, Any]] = {
    "engine": {"precision": "bf16"},
    "division": {"distill": 1.0, "distill_teacher": "frozen", "conquer_from": 6},
    "schedule": {"epochs": 9},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("precision"))


@contextmanager
def features_of(backbone: nn.Module) -> Iterator[list[Tensor]]:
    """What the backbone gives inside."""
    found = list[Tensor]()
    handle = backbone.register_forward_hook(lambda module, given, result: found.append(result.detach()))
    yield found
    handle.remove()


def product(head: EmbeddingHead, features: list[Tensor]) -> Tensor:
    """W f + b in fp32, of features in bf16."""
    (given,) = features
    assert given.dtype == torch.bfloat16
    return F.linear(given.float(), head.linear.weight, head.linear.bias).detach()


@pytest.mark.parametrize("chunks", [1, 3])
def test_training(root: Path, chunks: int) -> None:
    changes = {"engine": {"precision": "bf16", "grad_cache_chunks": chunks}, "model": {"batch_norm": "frozen"}}
    cfg = config(root, root / "run", **(BF16 | changes))
    data = RunData(cfg)
    objective = build_objective(cfg, data.train.num_classes).train()
    batch = next(data.train_batches(data.schedule(division_by_hand(data.train.labels, LEVEL), 0, conquer=False), first_step=0, skip=0))
    phase = Phase(0, LEVEL, conquer=False, backbone_frozen=False)
    with features_of(objective.backbone) as found:
        raw = objective.embed(batch, phase)
    expected = product(objective.head, [torch.cat(found)])
    assert raw.dtype == torch.float32 and torch.equal(raw, expected)
    assert not torch.equal(raw, raw.bfloat16().float())  # more than 8 bits
    raw.sum().backward()
    assert all(parameter.grad is not None for parameter in objective.backbone.parameters())
    assert objective.teacher is not None
    with features_of(objective.teacher.backbone) as found:
        taught = objective._teaching(raw, batch, phase)
    if chunks == 1:
        assert torch.equal(taught, product(objective.teacher.head, found))
    assert taught.dtype == torch.float32 and not torch.equal(taught, taught.bfloat16().float())


def test_evaluation_and_a_loaded_model(root: Path, tmp_path: Path) -> None:
    cfg = config(root, tmp_path / "run", **BF16)
    data = RunData(cfg)
    network: EmbeddingNetwork = build_objective(cfg, data.train.num_classes).eval()
    images = next(iter(data.sequential(data.test))).images
    with torch.inference_mode(), features_of(network.backbone) as found:
        whole = network.embeddings(images)
        expected = network.masks.whole(product(network.head, found))
        assert whole.dtype == torch.float32 and torch.equal(whole, expected)
        found.clear()
        mask = network.masks.level_masks(LEVEL)[1].relu()
        assert torch.equal(network.subspace(images, 1, LEVEL), F.normalize(product(network.head, found) * mask, dim=1))
        found.clear()
        assert torch.equal(network.features(images), F.normalize(found[0].float(), dim=1))
    model = Embedder(network, cfg, tmp_path, Exported("run", "last", 1, LEVEL), torch.device("cpu"), None)
    pixels = [image.permute(1, 2, 0).numpy() for image in images]
    with features_of(network.backbone) as found:
        embedded = torch.from_numpy(model.embed(pixels, batch_size=len(pixels)))
        assert torch.equal(embedded, network.masks.whole(product(network.head, found)).detach())
