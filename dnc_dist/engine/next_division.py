"""The next division of the training set: features of all its rows, and who of them cannot be decoded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dnc_dist.base.errors import Stopped
from dnc_dist.base.progress import Progress
from dnc_dist.clustering import (
    Division,
    DivisionRules,
    GroupRules,
    KMeansOptions,
    check_groups,
    check_num_learners,
    divide,
    spread_features,
)
from dnc_dist.config import RunConfig
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.extract import extract
from dnc_dist.engine.objective import DncObjective
from dnc_dist.engine.state import TrainState
from dnc_dist.processes import distributed
from dnc_dist.processes.signals import StopRequest


def group_rules(cfg: RunConfig) -> GroupRules | None:
    """How classes are grouped for batches; None if they are not."""
    div = cfg.division
    return None if div.batches == "learner" else GroupRules(div.batches, cfg.group_classes, div.skip_nearest)


def check_divisible(cfg: RunConfig, labels: np.ndarray) -> None:
    """Refuse what the classes of the training set, labels (N,), cannot be divided or grouped into.

    Raises:
        InputError: they are too few.
    """
    check_num_learners(labels, cfg.division.num_learners)
    if rules := group_rules(cfg):
        check_groups(labels, rules)


def next_division(
    objective: DncObjective, data: RunData, cfg: RunConfig, state: TrainState, *, stop: StopRequest, progress: Progress
) -> tuple[Division, list[str]]:
    """Collective. The division that follows the state's, and the keys of this rank's images that cannot be decoded.

    Those images have no features and are left out.

    Raises:
        Stopped: a rank was asked to stop.
    """
    div, view = cfg.division, data.train
    found = extract(
        objective,
        objective.features if div.cluster_on == "features" else objective.embeddings,
        data.sequential(view),
        name=f"epoch {state.epoch}: features",
        num_rows=len(view),
        stop=stop,
        progress=progress,
    )
    valid = distributed.gather_rows(found.valid.to(distributed.device())).cpu().numpy()
    previous = state.division
    if previous is not None:
        previous = replace(previous, learner_of=previous.learner_of[valid])

    def vote() -> None:
        if distributed.any_rank(stop.requested):
            raise Stopped(f"during the division of epoch {state.epoch}")

    rules = DivisionRules(
        div.num_learners,
        mode=div.mode,
        seed=cfg.run.seed,
        start=div.start,
        trials=div.trials,
        kmeans=KMeansOptions(div.kmeans_iterations, div.kmeans_backend, div.kmeans_tolerance),
        groups=group_rules(cfg),
    )
    features = spread_features(found.values[found.valid], int(valid[: found.start].sum()), int(valid.sum()), vote=vote)
    division = divide(features, view.labels[valid], rules, epoch=state.epoch, previous=previous)
    learner_of = np.full(len(view), -1, np.int16)
    learner_of[valid] = division.learner_of
    return replace(division, learner_of=learner_of, left_out=int((learner_of < 0).sum())), found.failed
