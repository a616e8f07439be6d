"""A step of the training loop, all of it but loading and logging, for what measures how long it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dnc_dist.config import RunConfig
from dnc_dist.data.loading import Batch
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_engine, build_objective, build_optimizer, seed_libraries, set_learning_rates
from dnc_dist.engine.zero import gradient_is_finite, start_deepspeed
from dnc_dist.processes import distributed


class EngineStep:
    """Collective. A network with its engine, in training. A call is a step.

    Args:
        cfg: what is trained; its data is not read.
        classes: of the training set.
        lr: learning rate of all groups.
        deepspeed: DeepSpeed's engine also on one process, which otherwise has the plain one.
    """

    def __init__(self, cfg: RunConfig, classes: int, *, lr: float, deepspeed: bool = False) -> None:
        objective = build_objective(cfg, classes).train()
        start: Any = start_deepspeed(objective, build_optimizer(objective, cfg), cfg) if deepspeed else build_engine(objective, cfg)
        self.engine, self.objective, self.cfg = start, objective, cfg
        self.rates = dict.fromkeys(("backbone", "embedding", "masks", "loss"), lr)

    def forward(self, batch: Batch, number: int) -> Tensor:
        """Collective. The loss of step ``number``; and, as in training, whether a rank was asked to stop."""
        set_learning_rates(self.engine, self.rates)
        seed_libraries(self.cfg.run.seed, number)
        phase = Phase(number, self.cfg.division.num_learners, conquer=False, backbone_frozen=False)
        loss, _ = self.engine(batch._replace(step=number), phase)
        distributed.count_ranks(False)
        return loss

    def update(self) -> None:
        """Collective. What follows the backward pass: norm, clipping, optimizer, and the look at the norm."""
        self.engine.step()
        gradient_is_finite(self.engine)

    def __call__(self, batch: Batch, number: int) -> None:
        """Collective. The whole step."""
        self.engine.backward(self.forward(batch, number))
        self.update()


def synchronize() -> None:
    """Wait until a GPU has done what it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
