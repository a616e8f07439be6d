"""The next division of the training set: features of its rows, or of some of each class, and who of them cannot be decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from dnc_dist.base.errors import Stopped
from dnc_dist.base.progress import Progress
from dnc_dist.base.rng import numpy_generator
from dnc_dist.clustering import (
    Division,
    DivisionRules,
    Features,
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


def places_to_look_at(labels: np.ndarray, cfg: RunConfig, *, epoch: int) -> np.ndarray:
    """(n,) int64 ascending places of the rows, of labels (N,), whose features the division of an epoch needs.

    These are all, or, where classes are compared by their means, ``division.images_per_class`` of each, drawn anew for each epoch.
    """
    most = cfg.division.images_per_class
    if most is None or cfg.division.batches == "learner":
        return np.arange(len(labels))
    drawn = numpy_generator(cfg.run.seed, "division", epoch).permutation(len(labels))
    # Stable, so rows of a class stay in the order in which they were drawn.
    by_class = drawn[np.argsort(labels[drawn], kind="stable")]
    sorted_labels = labels[by_class]
    rank_in_class = np.arange(len(labels)) - np.searchsorted(sorted_labels, sorted_labels)
    return np.sort(by_class[rank_in_class < most])


def next_division(
    objective: DncObjective, data: RunData, cfg: RunConfig, state: TrainState, *, stop: StopRequest, progress: Progress
) -> tuple[Division, list[str]]:
    """Collective. The division that follows the state's, and the keys of this rank's images that cannot be decoded.

    Those images have no features and are left out; so are classes of which no image that was looked at can be decoded.

    Raises:
        Stopped: a rank was asked to stop.
    """
    div, labels = cfg.division, data.train.labels
    places = places_to_look_at(labels, cfg, epoch=state.epoch)
    found = extract(
        objective,
        objective.features if div.cluster_on == "features" else objective.embeddings,
        data.sequential(data.index.select(data.train.name, data.train.rows[places])),
        name=f"epoch {state.epoch}: features",
        num_rows=len(places),
        stop=stop,
        progress=progress,
    )
    decoded = distributed.gather_rows(found.valid.to(distributed.device())).cpu().numpy()

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
    features = spread_features(found.values[found.valid], int(decoded[: found.start].sum()), int(decoded.sum()), vote=vote)
    valid = np.ones(len(labels), bool)
    valid[places[~decoded]] = False
    if len(places) < len(labels):
        known = labels[places[decoded]]
        valid &= np.isin(labels, known)
        features = _of_classes(features.means(known, data.train.num_classes), labels[valid], vote)
    previous = state.division
    if previous is not None:
        previous = replace(previous, learner_of=previous.learner_of[valid])
    division = divide(features, labels[valid], rules, epoch=state.epoch, previous=previous)
    learner_of = np.full(len(labels), -1, np.int16)
    learner_of[valid] = division.learner_of
    return replace(division, learner_of=learner_of, left_out=int((learner_of < 0).sum())), found.failed


def _of_classes(means: np.ndarray, labels: np.ndarray, vote: Callable[[], None]) -> Features:
    """Collective. For each row of labels (N,) the mean (of C, F) of its class."""
    start, stop = distributed.local_range(len(labels))
    return spread_features(torch.from_numpy(means[labels[start:stop]].astype(np.float32)), start, len(labels), vote=vote)
