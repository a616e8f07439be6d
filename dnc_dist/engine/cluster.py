"""A new division of the training set from features of its rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dnc_dist.base.errors import Stopped
from dnc_dist.base.progress import Progress
from dnc_dist.clustering.divide import divide
from dnc_dist.clustering.division import Division
from dnc_dist.config import RunConfig
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.extract import extract
from dnc_dist.engine.objective import DncObjective
from dnc_dist.engine.state import TrainState
from dnc_dist.processes import distributed
from dnc_dist.processes.signals import StopRequest


def cluster(
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

    division = divide(
        found.values[found.valid],
        view.labels[valid],
        row_start=int(valid[: found.start].sum()),
        target=div.num_learners,
        epoch=state.epoch,
        mode=div.mode,
        seed=cfg.run.seed,
        previous=previous,
        start=div.start,
        iterations=div.kmeans_iterations,
        trials=div.trials,
        backend=div.kmeans_backend,
        vote=vote,
    )
    learner_of = np.full(len(view), -1, np.int16)
    learner_of[valid] = division.learner_of
    return replace(division, learner_of=learner_of, left_out=int((learner_of < 0).sum())), found.failed
