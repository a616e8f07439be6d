"""What a run says of itself when it begins and when it ends."""

from __future__ import annotations

import logging
from typing import Any

from dnc_dist.config import RunConfig
from dnc_dist.data.index import RowView
from dnc_dist.engine import plan
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
    _log.info(phases(cfg))
    if note := batches_note(cfg):
        _log.info(note)
    if libraries:
        _log.info(libraries)
    if plan.finished(cfg, state):
        _log.info(f"this run has ended, after {state.epoch} epoch(s); a larger schedule.epochs goes on with it")
    elif state.step:
        _log.info(f"resumed in epoch {state.epoch}, after step {state.step}")


def batches_note(cfg: RunConfig) -> str:
    """Which classes share a batch, in words; empty where it is the published way."""
    div = cfg.division
    if div.batches == "learner" and div.hard_share == 1 and div.hard_from == 0:
        return ""
    n, in_batch = cfg.group_classes, cfg.schedule.batch_size // (div.learners_per_step * cfg.schedule.samples_per_class)
    skipped = f" behind the first {div.skip_nearest}" if div.skip_nearest else ""
    apart = f", the {div.skip_nearest} nearest of each mostly apart" if div.skip_nearest else ""
    made = {
        "learner": "those of the learner at random",
        "groups": f"a group of {n} close ones{apart}",
        "neighbours": f"one with its {n - 1} nearest{skipped}",
    }[div.batches]
    if div.batches != "learner" and n != in_batch:
        made = f"a random part of {made}" if n > in_batch else f"several times {made}"
    parts = [f"batches of {in_batch} classes: {made}"]
    if div.hard_from:
        parts.append(f"from epoch {div.hard_from} on")
    if div.hard_share < 1:
        parts.append(f"{div.hard_share:.0%} of all; the others of the whole training set")
    if div.batches != "learner":
        whole = "learners take whole classes, " if div.num_learners > 1 else ""
        parts.append(f"{whole}no image is left out but those without a second one of their class")
        if div.images_per_class is not None:
            parts.append(f"classes are compared by the mean of {div.images_per_class} image(s) each")
    return "; ".join(parts)


def phases(cfg: RunConfig) -> str:
    """What happens when, in words: how the learners grow, and when the whole embedding is trained."""
    div, epochs = cfg.division, cfg.schedule.epochs
    if div.num_learners == 1:
        return f"{epochs} epoch(s) with one learner"
    if div.mode == "flat" or div.divided_until == 0:
        grow = f"{div.num_learners} learners from the start, divided anew every {div.every} epoch(s)"
    else:
        grow = f"1 learner, twice as many every {div.every} epoch(s), all {div.num_learners} from epoch {div.divided_until} on"
    if div.conquer_epoch is not None:
        batches = "clusters" if div.conquer_batches == "clustered" else "the whole training set"
        then = " as they were then" if div.distill_teacher == "frozen" else ""
        taught = f", taught by the learners{then} (weight {div.distill:g})" if div.distill else ""
        return f"{epochs} epoch(s): {grow}; the whole embedding from epoch {div.conquer_epoch} on, with batches from {batches}{taught}"
    few = f": {epochs} epoch(s) are too few, {div.divided_until + 2} are the least" if epochs < div.divided_until + 2 else ""
    return f"{epochs} epoch(s): {grow}; the whole embedding is never trained together{few} (division.conquer_from)"


def result_values(cfg: RunConfig, state: TrainState, selected_on: str) -> dict[str, Any]:
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
