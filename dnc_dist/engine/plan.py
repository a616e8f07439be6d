"""What happens when: pure functions of the configuration and the train state, so nothing of it is ever stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dnc_dist.config import RunConfig
from dnc_dist.engine.state import TrainState


@dataclass(frozen=True)
class Phase:
    """What one step needs to know about its place in the training."""

    step: int
    level: int
    """Current number of learners k."""
    conquer: bool
    backbone_frozen: bool


def finished(cfg: RunConfig, state: TrainState) -> bool:
    """Whether all epochs are done."""
    return state.epoch >= cfg.schedule.epochs


def conquering(cfg: RunConfig, epoch: int) -> bool:
    """Whether the whole embedding is trained together in this epoch."""
    return cfg.division.conquer_epoch is not None and epoch >= cfg.division.conquer_epoch


def trains_whole_set(cfg: RunConfig, epoch: int) -> bool:
    """Whether batches of this epoch are drawn from the whole training set, without a division."""
    return conquering(cfg, epoch) and cfg.division.conquer_batches == "whole"


def learners_at(cfg: RunConfig, epoch: int) -> int:
    """How many learners there are in this epoch, 1 where the training set is whole."""
    return 1 if trains_whole_set(cfg, epoch) else _divided_into(cfg, epoch)


def trained_learners(cfg: RunConfig, state: TrainState) -> int:
    """How many learners have a subspace in what is trained so far: those of the last division, or of the time before the whole set."""
    if state.division is None:
        return 1
    if not trains_whole_set(cfg, state.division.epoch):
        return state.division.num_learners
    assert cfg.division.conquer_epoch is not None
    return _divided_into(cfg, max(cfg.division.conquer_epoch - 1, 0))


def _divided_into(cfg: RunConfig, epoch: int) -> int:
    div = cfg.division
    return div.num_learners if div.mode == "flat" else min(2 ** (epoch // div.every), div.num_learners)


def division_due(cfg: RunConfig, state: TrainState) -> bool:
    """Whether to divide before training this epoch; False once it was done, so that a resume never divides twice."""
    made_in = state.division.epoch if state.division is not None else -1
    if trains_whole_set(cfg, state.epoch):
        assert cfg.division.conquer_epoch is not None
        return made_in < cfg.division.conquer_epoch
    return state.epoch % cfg.division.every == 0 and made_in < state.epoch


def division_needs_features(cfg: RunConfig, state: TrainState) -> bool:
    """Whether the division that is due clusters the training set, or groups its classes; else one learner takes it whole."""
    div, epoch = cfg.division, state.epoch
    if trains_whole_set(cfg, epoch):
        return False
    return learners_at(cfg, epoch) > 1 or (div.batches != "learner" and any(hard_share(cfg, epoch + at) for at in range(div.every)))


def hard_share(cfg: RunConfig, epoch: int) -> float:
    """Share of the batches of this epoch that are made as ``division.batches`` says, and not of the whole training set."""
    return cfg.division.hard_share if cfg.division.hard_from <= epoch < cfg.schedule.epochs else 0.0


def subspaces_change(cfg: RunConfig, state: TrainState) -> bool:
    """Whether the next step's embeddings lie in other subspaces than those before; False once it is done, also after a resume."""
    if state.batches_done > 0:
        return False
    if conquering(cfg, state.epoch):
        return state.epoch == cfg.division.conquer_epoch
    return cfg.division.num_learners > 1 and state.division is not None and state.division.epoch == state.epoch


def backbone_frozen(cfg: RunConfig, epoch: int) -> bool:
    """Whether the backbone waits in this epoch: the first ones after each division; one learner is divided once, at the start."""
    since_division = epoch % cfg.division.every if cfg.division.num_learners > 1 else epoch
    return not trains_whole_set(cfg, epoch) and since_division < cfg.division.backbone_frozen_epochs


def phase(cfg: RunConfig, state: TrainState) -> Phase:
    """The phase of the next step."""
    assert state.division is not None
    return Phase(state.step, state.division.num_learners, conquering(cfg, state.epoch), backbone_frozen(cfg, state.epoch))


def evaluation_due(cfg: RunConfig, epoch: int) -> bool:
    """Whether to evaluate after training this epoch."""
    return (epoch + 1) % cfg.evaluation.every == 0 or epoch + 1 == cfg.schedule.epochs


def nmi_due(cfg: RunConfig, epoch: int) -> bool:
    """Whether this evaluation computes NMI."""
    return cfg.evaluation.nmi == "every" or (cfg.evaluation.nmi == "final" and epoch + 1 == cfg.schedule.epochs)


def lr_share(cfg: RunConfig, progress_epochs: float) -> float:
    """Factor on every learning rate after ``progress_epochs`` epochs: linear warm-up, then constant or cosine."""
    sch = cfg.schedule
    if progress_epochs < sch.warmup:
        # Never exactly 0, which would make the groups wait.
        return max(progress_epochs, 1e-3) / sch.warmup
    if sch.decay == "constant":
        return 1.0
    share = (progress_epochs - sch.warmup) / (sch.epochs - sch.warmup)
    return sch.final_lr_share + (1 - sch.final_lr_share) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def learning_rates(cfg: RunConfig, state: TrainState, batches_in_epoch: int) -> dict[str, float]:
    """Learning rate of each parameter group for the next step; 0 makes a group wait."""
    base = cfg.optim.lr * lr_share(cfg, state.epoch + state.batches_done / max(batches_in_epoch, 1))
    return {
        "backbone": 0.0 if backbone_frozen(cfg, state.epoch) else base,
        "embedding": base,
        "masks": 0.0 if conquering(cfg, state.epoch) else base * cfg.optim.mask_lr_mult,
        "loss": base * cfg.optim.loss_lr_mult,
    }
