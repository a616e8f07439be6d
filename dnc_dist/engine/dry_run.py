"""What a run would do, before it does anything: its epochs, what steps and passes cost on this machine, and what a checkpoint takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
import torch

from dnc_dist.base.progress import format_seconds
from dnc_dist.clustering.division import whole
from dnc_dist.config import RunConfig
from dnc_dist.data.batching import num_steps
from dnc_dist.engine import plan
from dnc_dist.engine.announce import batches_note, phases
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.next_division import check_divisible, places_to_look_at
from dnc_dist.engine.objective import DncObjective
from dnc_dist.engine.setup import build_optimizer, kernels_note, libraries_note, objective_of_run, seed_libraries
from dnc_dist.engine.state import TrainState
from dnc_dist.engine.steplog import TimedBatches
from dnc_dist.processes import distributed
from dnc_dist.processes.memory import MB, peak_memory_mb
from dnc_dist.rundir.checkpoints import Checkpoints
from dnc_dist.rundir.folder import check_unchanged

STEPS = 4
"""Steps that are timed, after one that is not; fewer, at least one, where they take longer than SECONDS."""
SECONDS = 20.0


class _Costs(NamedTuple):
    """What was measured: seconds of a step, of them waiting for its images, of one image in a pass; rows of a step; peak memory in MB."""

    step: float
    waited: float
    image: float
    rows: int
    peak_mb: float


def dry_run(cfg: RunConfig, world: int) -> str:
    """What `launch` with ``world`` processes would do, in words; trains a few steps in this process and writes nothing.

    Raises:
        InputError: whatever would end the run at its start: data, weights, or values that do not fit.
    """
    kernels = kernels_note(cfg.division.kmeans_backend)
    if begun := Checkpoints(cfg.run.path, cfg.checkpoint.keep).tags():
        check_unchanged(cfg)
    data = RunData(_share_of(cfg, world))
    try:
        data.selection_view()
        check_divisible(cfg, data.train.labels)
        objective = objective_of_run(cfg, data.train.num_classes, begins=True)
        costs = _measure(cfg, data, objective)
    finally:
        data.close()
    lines = [
        f"{cfg.run.path} holds this run up to {tag}, where it goes on if epochs are left; this is the plan of the whole run"
        for tag in begun[-1:]
    ]
    lines += [*_data(cfg, data, world), phases(cfg), *filter(None, [batches_note(cfg)]), ""]
    lines += _table(["epochs", "learners", "batches from", "backbone", "steps", "learning rate"], _epochs(cfg, len(data.train)))
    lines += ["", f"{cfg.loss.name} loss, {kernels}", *filter(None, [libraries_note(objective)])]
    lines += [*_model(objective, cfg, world), *_costs(cfg, data, costs, world)]
    return "\n".join([*lines, "dry run: nothing was written"])


def _data(cfg: RunConfig, data: RunData, world: int) -> Iterator[str]:
    sch = cfg.schedule
    yield f"{cfg.run.path}: {len(data.train)} training images of {data.train.num_classes} classes in {cfg.data.root}"
    for name, view in (("validation", data.validation), ("test", data.test)):
        if view is not None:
            yield f"{name}: {len(view)} images of {view.num_classes} classes"
    learners = cfg.division.learners_per_step
    share = sch.batch_size // learners
    yield (
        f"{sch.batch_size} images a step over {world} process(es){f', of {learners} learners' if learners > 1 else ''}: "
        f"{share // sch.samples_per_class} classes x {sch.samples_per_class}, so {share - sch.samples_per_class} images of other classes "
        "for every anchor"
    )


def _epochs(cfg: RunConfig, num_rows: int) -> list[list[str]]:
    """Consecutive epochs that are alike, a line each. The number of steps follows from equally large learners."""

    def kind(epoch: int) -> tuple[str, ...]:
        learners = plan.learners_at(cfg, epoch)
        source = _source(cfg, epoch, learners)
        whole_embedding = "all, as one" if plan.conquering(cfg, epoch) else str(learners)
        return whole_embedding, source, "waits" if plan.backbone_frozen(cfg, epoch) else "learns", f"{steps_at(cfg, epoch, num_rows)} each"

    lines = []
    for alike, group in groupby(range(cfg.schedule.epochs), kind):
        epochs = list(group)
        rates = [cfg.optim.lr * plan.lr_share(cfg, epoch) for epoch in (epochs[0], epochs[-1] + 1)]
        numbers = str(epochs[0]) if len(epochs) == 1 else f"{epochs[0]}-{epochs[-1]}"
        lines.append([numbers, *alike, f"{rates[0]:.2g}" if rates[0] == rates[1] else f"{rates[0]:.2g} to {rates[1]:.2g}"])
    return lines


def _source(cfg: RunConfig, epoch: int, learners: int) -> str:
    """What batches of an epoch are drawn from."""
    div, share = cfg.division, plan.hard_share(cfg, epoch)
    hard = "clusters" if div.batches == "learner" else div.batches
    if share == 0 or plan.trains_whole_set(cfg, epoch) or (learners == 1 and div.batches == "learner"):
        return "the whole set"
    return hard if share == 1 else f"{hard} {share:.0%}"


def steps_at(cfg: RunConfig, epoch: int, num_rows: int) -> int:
    """Steps of an epoch whose learners are equally large."""
    learners = plan.learners_at(cfg, epoch)
    sizes = np.full(learners, -(-num_rows // learners))
    return num_steps(sizes, num_rows, cfg.schedule.batch_size, cfg.division.learners_per_step, cfg.schedule.epoch_length)


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in (head, *lines)]


def _model(objective: DncObjective, cfg: RunConfig, world: int) -> Iterator[str]:
    count = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in (
            ("backbone", objective.backbone),
            ("embedding", objective.head),
            ("masks", objective.masks),
            ("loss", objective.loss),
        )
    }
    total, copied = sum(count.values()), sum(value.numel() for value in objective.teacher.parameters()) if objective.teacher else 0
    yield f"parameters: {', '.join(f'{name} {number:,}' for name, number in count.items() if number)}"
    sharded = world if cfg.engine.zero >= 1 else 1
    held = 4 * (total * (2 + 2 / sharded) + copied)
    copy = ", with a copy that teaches" if copied else ""
    yield (
        f"weights{copy}, gradients and moments in fp32, ZeRO {cfg.engine.zero}: {held / MB:,.0f} MB in each of {world} process(es); "
        f"a checkpoint takes {4 * (3 * total + copied) / MB:,.0f} MB, of which {cfg.checkpoint.keep} are kept"
    )


def _costs(cfg: RunConfig, data: RunData, costs: _Costs, world: int) -> Iterator[str]:
    where = torch.cuda.get_device_name() if distributed.device().type == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    yield (
        f"measured here, one process on {where}: a step of {costs.rows} images {1000 * costs.step:.3g} ms, of them "
        f"{1000 * costs.waited:.3g} ms waiting for images; {1 / costs.image:.3g} images/s in passes; peak memory {costs.peak_mb:,.0f} MB"
    )
    epochs = range(cfg.schedule.epochs)
    steps = sum(steps_at(cfg, epoch, len(data.train)) for epoch in epochs)
    divisions = sum(epoch % cfg.division.every == 0 and plan.division_needs_features(cfg, TrainState(epoch=epoch)) for epoch in epochs)
    evaluations = sum(plan.evaluation_due(cfg, epoch) for epoch in epochs) + cfg.evaluation.at_start
    measured = sum(len(view) for view in (data.test, data.validation) if view is not None)
    training = steps * costs.step
    looked_at = len(places_to_look_at(data.train.labels, cfg, epoch=0))
    passes = (divisions * looked_at + evaluations * measured) * costs.image / world
    yield (
        f"{steps} steps of {cfg.schedule.batch_size} images about {format_seconds(training)}; {divisions} division(s) and {evaluations} "
        f"evaluation(s) about {format_seconds(passes)} for their passes over the images; k-means, search and the waiting of "
        "processes for each other are not in it"
    )


def _share_of(cfg: RunConfig, world: int) -> RunConfig:
    """The configuration whose step is what one of ``world`` processes computes in a step: whole classes, two at least."""
    per_class = cfg.schedule.samples_per_class
    rows = max(cfg.schedule.batch_size // world // per_class, 2) * per_class
    schedule = cfg.schedule.model_copy(update={"batch_size": rows})
    division = cfg.division.model_copy(update={"learners_per_step": 1})
    return cfg.model_copy(update={"schedule": schedule, "division": division})


def _measure(cfg: RunConfig, data: RunData, objective: DncObjective) -> _Costs:
    """What steps of real images cost here, with forward, backward and update, and what a pass costs."""
    optimizer = build_optimizer(objective, cfg)
    schedule = data.schedule(whole(data.train.labels), 0, conquer=False)
    batches = TimedBatches(data.train_batches(schedule, first_step=0, skip=0))
    # As the first epoch trains, but that nothing is divided yet: the first learner takes every image.
    level, conquer = plan.learners_at(cfg, 0), plan.conquering(cfg, 0)
    objective.train()
    seconds, waited, before = [], [], 0.0
    began = start = time.monotonic()
    for step, batch in enumerate(islice(batches, STEPS + 1)):
        seed_libraries(cfg.run.seed, step)
        loss, _ = objective(batch.to(distributed.device()), plan.Phase(step, level, conquer, backbone_frozen=False))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait()
        now = time.monotonic()
        seconds.append(now - start)
        waited.append(batches.waited - before)
        start, before = now, batches.waited
        if step and now - began > SECONDS:
            break
    at = 1 if len(seconds) > 1 else 0  # the first one starts workers and chooses algorithms
    return _Costs(
        statistics.median(seconds[at:]),
        statistics.median(waited[at:]),
        _seconds_of_an_image(data, objective),
        int(schedule.starts[1]),
        peak_memory_mb(),
    )


def _seconds_of_an_image(data: RunData, objective: DncObjective) -> float:
    """Seconds for one image in a pass, by the second block of one."""
    objective.eval()
    blocks = iter(data.sequential(data.train))
    start = time.monotonic()
    with torch.inference_mode():
        for block in islice(blocks, 2):
            start = start if block.number else time.monotonic()
            objective.embeddings(block.images.to(distributed.device()))
            _wait()
            seconds, start = time.monotonic() - start, time.monotonic()
    return seconds / len(block.places)


def _wait() -> None:
    if distributed.device().type == "cuda":
        torch.cuda.synchronize()
