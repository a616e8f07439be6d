"""Every loss trains the tiny network on real images, in fp32 and under bf16 autocast: finite throughout, and it goes down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_objective
from tests.engine_fixtures import config, division_by_hand, make_dataset
from tests.test_loss_parity import LOSSES

STEPS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("training"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_few_steps(root: Path, loss: dict[str, Any], precision: str) -> None:
    cfg = config(root, root / "run", loss=loss, division={"learners_per_step": 2}, engine={"precision": precision})
    data = RunData(cfg)
    objective = build_objective(cfg, data.train.num_classes).train()
    batch = next(data.train_batches(data.schedule(division_by_hand(data.train.labels, 2), 0, conquer=False), first_step=0, skip=0))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    values = []
    for _ in range(STEPS):  # the same step, so that the same pairs are drawn
        optimizer.zero_grad()
        value, stats = objective(batch, Phase(0, 2, conquer=False, backbone_frozen=False))
        value.backward()
        assert value.isfinite() and value.dtype == torch.float32
        assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in objective.parameters())
        optimizer.step()
        values.append(float(stats["loss"]))
    assert all(parameter.isfinite().all() for parameter in objective.parameters())
    assert min(values[1:]) < values[0]
