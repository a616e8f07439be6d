"""The whole configuration: its sections, what has to fit together between them, and the parts that it chooses."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from functools import cache, reduce
from typing import Annotated, Any

from pydantic import Field, model_validator

from dnc_dist.base.choice import Choice
from dnc_dist.base.parts import Named
from dnc_dist.base.web import is_url
from dnc_dist.config.keys import (
    CheckpointConfig,
    Data,
    DivisionConfig,
    Engine,
    Evaluation,
    Model,
    Optim,
    Run,
    Schedule,
    Section,
    TrackerConfig,
)

MACHINE_KEYS = ("data.root", "data.workers", "data.cache", "data.cache_gb", "data.retry_seconds", "engine.timeout", "engine.stall_timeout")
"""Where a machine finds things, and how long it waits: they decide no number."""


class RunConfig(Section):
    """The whole configuration of a run."""

    run: Run = Field(default_factory=Run)
    data: Data
    model: Model = Field(default_factory=Model)
    loss: Annotated[Named, Choice("loss", "margin", section=True)] = Field("margin", validate_default=True)
    division: DivisionConfig = Field(default_factory=DivisionConfig)
    schedule: Schedule = Field(default_factory=Schedule)
    optim: Optim = Field(default_factory=Optim)
    engine: Engine = Field(default_factory=Engine)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = Field(default_factory=TrackerConfig)

    @model_validator(mode="after")
    def _sections_fit_together(self) -> RunConfig:
        problems = list(_conflicts(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def group_classes(self) -> int:
        """Classes of a group; of a batch of one learner, where they are `auto`."""
        wanted = self.division.group_classes
        in_batch = self.schedule.batch_size // (self.division.learners_per_step * self.schedule.samples_per_class)
        return in_batch if wanted == "auto" else wanted

    def digest(self) -> str:
        """Short hash of everything that decides the result (not where it is written or logged)."""
        relevant = self.model_dump(mode="json", exclude={"run": {"dir", "name"}, "tracker": True, "checkpoint": True})
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:12]


def _conflicts(cfg: RunConfig) -> Iterator[str]:
    """Problems that involve more than one key."""
    div, sch = cfg.division, cfg.schedule
    learners, power_of_two = div.num_learners, div.num_learners & (div.num_learners - 1) == 0
    if div.mode == "hierarchical" and not power_of_two:
        yield (
            f"division.num_learners={learners} must be a power of two when division.mode=hierarchical; "
            "use 2, 4, 8 ... or division.mode=flat"
        )
    elif div.mode == "hierarchical" and isinstance(div.conquer_from, int) and learners > 1:
        first = div.divided_until + 1
        if div.conquer_from < first:
            yield (
                f"division.conquer_from={div.conquer_from} comes before all {learners} learners exist (with division.every={div.every} "
                f"that is epoch {first - 1}); use {first} or more"
            )
    if div.learners_per_step > learners:
        yield f"division.learners_per_step={div.learners_per_step} is more than division.num_learners={learners}; use at most {learners}"
    if sch.batch_size % (div.learners_per_step * sch.samples_per_class):
        yield (
            f"schedule.batch_size={sch.batch_size} is not divisible by schedule.samples_per_class={sch.samples_per_class} times "
            f"division.learners_per_step={div.learners_per_step}; use a multiple of {div.learners_per_step * sch.samples_per_class}"
        )
    elif sch.batch_size // (div.learners_per_step * sch.samples_per_class) < 2:
        yield (
            f"schedule.batch_size={sch.batch_size} gives every learner one class per step, so there are no negatives; use at least "
            f"{2 * div.learners_per_step * sch.samples_per_class}"
        )
    if div.backbone_frozen_epochs >= div.every:
        yield (
            f"division.backbone_frozen_epochs={div.backbone_frozen_epochs} must be less than division.every={div.every}, "
            "or the backbone never learns"
        )
    if isinstance(div.conquer_from, int) and div.conquer_from >= sch.epochs:
        yield (
            f"division.conquer_from={div.conquer_from} is not below schedule.epochs={sch.epochs}; "
            "use a smaller epoch, auto, or null for no conquer phase"
        )
    yield from _conflicts_of_batches(cfg)
    yield from _conflicts_of_distillation(cfg)
    if is_url(cfg.data.root) and cfg.data.retry_seconds >= cfg.engine.stall_timeout:
        yield (
            f"data.retry_seconds={cfg.data.retry_seconds:g} must be less than engine.stall_timeout={cfg.engine.stall_timeout:g}, or a run "
            "that waits for a server is ended as one that hangs"
        )
    if cfg.data.streams:
        if cfg.data.lanes < div.learners_per_step:
            yield f"data.lanes={cfg.data.lanes} is less than division.learners_per_step={div.learners_per_step}; use a multiple of it"
        if sch.epoch_length == "over":
            yield (
                "schedule.epoch_length=over shows images of small clusters several times an epoch, data.access=stream reads each once; "
                "use schedule.epoch_length=dataset, or data.access=indexed"
            )
    if cfg.engine.compile and cfg.engine.grad_cache_chunks > 1:
        yield (
            f"engine.grad_cache_chunks={cfg.engine.grad_cache_chunks} computes a batch twice with the same random numbers, which "
            "engine.compile=true may draw in another order the second time; set one of them to its default"
        )
    if cfg.engine.stall_timeout > cfg.engine.timeout:
        yield (
            f"engine.stall_timeout={cfg.engine.stall_timeout:g} is longer than engine.timeout={cfg.engine.timeout:g}, which is for longer "
            "waits; use at most that, or raise engine.timeout"
        )
    if sch.warmup >= sch.epochs:
        yield f"schedule.warmup={sch.warmup} must be less than schedule.epochs={sch.epochs}"
    if not cfg.evaluation.test and cfg.evaluation.select_on == "test":
        yield "evaluation.select_on=test needs evaluation.test=true; set that, or select on validation"
    if 1 not in cfg.evaluation.recall_at:
        yield (
            f"evaluation.recall_at={list(cfg.evaluation.recall_at)} must contain 1: recall@1 stands in RESULT "
            "and selects the best checkpoint"
        )
    for path in choices():
        yield from chosen(cfg, path).conflicts(cfg)


def _conflicts_of_batches(cfg: RunConfig) -> Iterator[str]:
    """Problems of which classes share a batch."""
    div = cfg.division
    if div.batches == "learner":
        set_keys = {
            "group_classes": div.group_classes != "auto",
            "skip_nearest": div.skip_nearest > 0,
        }
        for key, is_set in set_keys.items():
            if is_set:
                yield f"division.{key}={getattr(div, key)} is of groups, and division.batches=learner makes none; use groups or neighbours"
    whole_too = div.hard_share < 1 or div.hard_from > 0
    if cfg.data.streams and (div.batches != "learner" or whole_too):
        yield (
            f"data.access=stream makes batches of what is in memory: division.batches=learner, hard_share=1 and hard_from=0 only, not "
            f"{div.batches}, {div.hard_share:g} and {div.hard_from}; use these, or data.access=indexed"
        )
    if whole_too and div.learners_per_step > 1:
        yield (
            f"division.hard_share={div.hard_share:g} and hard_from={div.hard_from} bring batches of the whole set, which can give two "
            f"learners of a step the same image; use division.learners_per_step=1 instead of {div.learners_per_step}, or 1 and 0"
        )
    conquer = _conquer_epoch(cfg)
    end = max(conquer if div.conquer_batches == "whole" and conquer is not None else cfg.schedule.epochs, 1)
    if div.hard_from >= end:
        yield f"division.hard_from={div.hard_from} is after the last such batch; use less than {end}, or division.hard_share=0 for none"


def _conflicts_of_distillation(cfg: RunConfig) -> Iterator[str]:
    """Problems of learners that are to teach the whole embedding."""
    div, conquer = cfg.division, _conquer_epoch(cfg)
    if div.distill == 0:
        for key, is_set in (("distill_temperature", div.distill_temperature != 1), ("distill_teacher", div.distill_teacher != "present")):
            if is_set:
                yield f"division.{key}={getattr(div, key)} has no effect with division.distill=0; set a weight, for example 1"
        return
    weight = f"division.distill={div.distill:g} lets the learners teach the whole embedding"
    if div.num_learners == 1:
        yield f"{weight}, but there is one learner, which is the whole embedding; set division.num_learners to 2 or more, or distill=0"
    elif conquer is None:
        yield (
            f"{weight} while it is trained together, but with division.conquer_from={_word(div.conquer_from)} and "
            f"schedule.epochs={cfg.schedule.epochs} it never is; set conquer_from to an epoch after {div.divided_until} and "
            "schedule.epochs above it, or distill=0"
        )
    elif div.conquer_batches == "whole":
        yield (
            f"{weight}, each in its own cluster, but division.conquer_batches=whole gives batches of all clusters; "
            "use division.conquer_batches=clustered, or distill=0"
        )
    elif div.hard_share < 1 or div.hard_from > conquer:
        yield (
            f"{weight}, each in its own cluster, but division.hard_share={div.hard_share:g} and hard_from={div.hard_from} bring batches of "
            f"the whole set after epoch {conquer}, where that begins; use 1 and at most {conquer}, or distill=0"
        )


def _conquer_epoch(cfg: RunConfig) -> int | None:
    """The epoch from which the whole embedding is trained together, also of a configuration that is not resolved yet; None: never."""
    return conquer_start(cfg) if cfg.division.conquer_from == "auto" else cfg.division.conquer_from


def _word(value: Any) -> str:
    """A value as YAML writes it."""
    return "null" if value is None else str(value)


def conquer_start(cfg: RunConfig) -> int | None:
    """The epoch that ``division.conquer_from: auto`` means; None: never.

    The published share of a training is 80 of 180 epochs. All learners are to have trained for a period by then, which in a short training
    leaves at least its last epoch to the whole embedding.
    """
    div, last = cfg.division, cfg.schedule.epochs - 1
    first = div.divided_until + 1
    if div.num_learners == 1 or last < first:
        return None
    published = math.ceil(cfg.schedule.epochs * 4 / 9 / div.every) * div.every
    return min(max(published, div.divided_until + div.every), last)


def sections() -> dict[str, type[Section]]:
    """Name -> class of each section; of the loss, whose keys depend on its name, ``choices`` tells."""
    return {name: field.annotation for name, field in RunConfig.model_fields.items() if _choice(field) is None}  # type: ignore[misc]


@cache
def choices() -> dict[str, Choice]:
    """Dotted key -> the choice of a part that its value makes."""
    found = {name: _choice(field) for name, field in RunConfig.model_fields.items()}
    found |= {f"{name}.{key}": _choice(field) for name, model in sections().items() for key, field in model.model_fields.items()}
    return {path: choice for path, choice in found.items() if choice is not None}


def chosen(cfg: RunConfig, path: str) -> Named:
    """The part that the configuration chooses at a key of ``choices``."""
    found: Named = reduce(getattr, path.split("."), cfg)  # type: ignore[assignment]
    return found


def _choice(field: Any) -> Choice | None:
    return next((item for item in field.metadata if isinstance(item, Choice)), None)
