"""What a run says of itself when it begins and when it ends."""

from __future__ import annotations

import logging
from typing import Any

from dnc_dist.config import RunConfig
from dnc_dist.data.index import RowView
from dnc_dist.engine.state import Best, TrainState
from dnc_dist.processes import distributed

_log = logging.getLogger(__name__)


def announce(cfg: RunConfig, view: RowView, state: TrainState, kernels: str, libraries: str | None) -> None:
    """Say what a run begins with."""
    per_class = cfg.schedule.samples_per_class
    negatives = cfg.schedule.batch_size // cfg.division.learners_per_step - per_class
    _log.info(
        f"{cfg.run.path}: {len(view)} training images of {view.num_classes} classes, {distributed.world_size()} process(es), "
        f"ZeRO {cfg.engine.zero}"
    )
    _log.info(
        f"{cfg.schedule.batch_size} images a step over all processes, {per_class} of a class, so {negatives} of other classes for "
        f"every anchor; {cfg.loss.name} loss, {kernels}"
    )
    if libraries:
        _log.info(libraries)
    if state.step:
        _log.info(f"resumed in epoch {state.epoch}, after step {state.step}")


def result(cfg: RunConfig, state: TrainState, selected_on: str) -> dict[str, Any]:
    """The values of the RESULT line: of the epoch that was selected, or of the last one."""
    chosen = state.best or Best(epoch=state.epoch, samples_seen=state.samples_seen, metrics=state.metrics)
    metrics = {name: chosen["metrics"].get(name) for name in ("recall@1", "map@r", "nmi", "protocol")}
    # Only some protocols have these.
    metrics |= {name: chosen["metrics"][name] for name in ("list", "map", "recall@1_std", "map_std") if name in chosen["metrics"]}
    values = {"run": str(cfg.run.path), "epoch": chosen["epoch"], "samples_seen": chosen["samples_seen"], **metrics}
    values["selected_on"] = selected_on
    if state.baseline:
        values["untrained_recall@1"] = state.baseline.get("recall@1")
    return values
