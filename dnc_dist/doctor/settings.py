"""Which losses and masks the parity check compares: those of the table of parts, or those of a configuration."""

from __future__ import annotations

from typing import Any, Literal

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.config import RunConfig
from dnc_dist.doctor.steps import Plan
from dnc_dist.doctor.table import Check

Losses = Literal["default", "all"]
DEFAULT_LOSSES = ("margin", "proxy_anchor")
"""One of pairs and one of whole batches, each with parameters of its own."""


def plan_of_table(losses: Losses) -> tuple[Plan, list[Check]]:
    """Losses with the options that their classes name as examples, and every other kind of mask with the first of them.

    Args:
        losses: "default", with the first and the last example of each; "all" of the table, with all examples.

    Returns:
        The plan, and what cannot be checked as a package is missing.
    """
    settings: dict[str, dict[str, Any]] = {}
    missing = []
    for name in DEFAULT_LOSSES if losses == "default" else parts.TABLE["loss"]:
        examples = parts.load("loss", name).examples
        for options in examples if losses == "all" else {0: examples[0], len(examples) - 1: examples[-1]}.values():
            try:
                parts.build("loss", {"name": name, **options}, num_classes=8, embedding_dim=8)
            except InputError as error:
                missing.append(Check(_words(name, options), "not checked", "warning", str(error)))
            else:
                settings[f"{_words(name, options)}, learned masks"] = {"loss": {"name": name, **options}}
    for mask in parts.TABLE["mask"]:
        if mask != "learned":
            mode = "flat" if mask == "sliced" else "hierarchical"
            settings[f"{DEFAULT_LOSSES[0]}, {mask} masks"] = {"model": {"masks": mask}, "division": {"mode": mode}}
    first = parts.load("loss", DEFAULT_LOSSES[0]).examples[-1]
    return Plan(settings, last=f"{_words(DEFAULT_LOSSES[0], first)}, learned masks"), missing


def plan_of_config(cfg: RunConfig) -> Plan:
    """The loss and the masks of a configuration, with as many learners in a step as it has."""
    shared, every = cfg.division.learners_per_step, cfg.division.num_learners
    if every > 4:  # more would only make the check longer
        every = max(4, shared)
        if not cfg.division.num_learners & (cfg.division.num_learners - 1):  # where halves may be split, they are here, too
            every = 1 << (every - 1).bit_length()
    loss = cfg.loss.model_dump(mode="json")
    options = {key: value for key, value in cfg.loss.model_dump(mode="json", exclude_defaults=True).items() if key != "name"}
    masks = cfg.model.model_dump(mode="json")["masks"]
    penalty = cfg.division.mask_penalty
    if loss.get("memory"):
        # The check's steps are few, and may be larger than those of the configuration: they use the memory from the first one on.
        loss |= {"memory": max(loss["memory"], Plan({}, (1, shared)).rows), "memory_from": 0}
    setting = {"loss": loss, "model": {"masks": masks}, "division": {"mode": cfg.division.mode, "mask_penalty": penalty}}
    return Plan({f"{_words(cfg.loss.name, options)}, {cfg.model.masks.name} masks": setting}, tuple(sorted({1, shared})), every)


def _words(name: str, options: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in options.items())])
