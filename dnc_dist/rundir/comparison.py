"""Runs side by side: what may be compared, runs of several seeds as one group, and differences seed by seed.

The difference of two groups is taken in pairs of runs with the same seed, which draw the same random numbers: what a seed does to both
falls out of it, so that it deviates less than the groups themselves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import printable, shorten
from dnc_dist.base.settings import dotted
from dnc_dist.config import MACHINE_KEYS
from dnc_dist.rundir.card import CARD, Card
from dnc_dist.rundir.record import RunRecord, number, read_run

FREE = ("seed", "version", "commit", "epoch", "checkpoint")
"""Fields of a card in which comparable numbers may differ."""
_FREE_SECTIONS = ("run", "tracker", "checkpoint")
"""They decide no number, and so no group."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of n - 1; None for a single one) of n numbers."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """That of some numbers, at least one."""
        return cls(mean(values), stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Measured:
    """A run and its result. Without an evaluation so far ``card`` is None and ``metrics`` is empty."""

    path: Path
    config: dict[str, Any]
    card: Card | None
    metrics: dict[str, float]
    seed: int | None
    epochs: int
    """Done and measured."""
    planned: int | None

    @property
    def finished(self) -> bool:
        """Whether all epochs are done; the last one is always measured."""
        return self.card is not None and self.planned is not None and self.epochs >= self.planned


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only."""

    runs: list[Measured]

    def __getitem__(self, name: str) -> dict[int | None, float]:
        """The values of a metric by seed."""
        return {run.seed: run.metrics[name] for run in self.runs if name in run.metrics}

    def spread(self, name: str) -> Spread | None:
        """Of a metric over the seeds; None where no run has it."""
        values = list(self[name].values())
        return Spread.of(values) if values else None

    def difference(self, other: Group, name: str) -> Spread | None:
        """Of a metric to another group's, over the seeds that both have; None without any."""
        mine, theirs = self[name], other[name]
        pairs = [value - theirs[seed] for seed, value in mine.items() if seed in theirs]
        return Spread.of(pairs) if pairs else None


@dataclass(frozen=True)
class Comparison:
    """Groups of comparable runs, the first one being what the others are compared with."""

    groups: list[Group]
    card: dict[str, Any]
    """What all numbers stand on: the fields in which they may not differ."""

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics."""
        return list(dict.fromkeys(name for group in self.groups for run in group.runs for name in run.metrics))

    def config_differences(self) -> dict[str, list[Any]]:
        """Dotted keys of the configuration whose values differ, with that of each group (None: it has no such key)."""
        configs = [group.runs[0].config for group in self.groups]
        keys = dict.fromkeys(key for config in configs for key in config)
        found = {key: [config.get(key) for config in configs] for key in keys}
        return {key: values for key, values in found.items() if any(value != values[0] for value in values)}

    def plain(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        first, groups = self.groups[0], []
        for group in self.groups:
            spreads = {name: asdict(found) for name in self.metrics if (found := group.spread(name))}
            pairs = {name: asdict(found) for name in self.metrics if group is not first and (found := group.difference(first, name))}
            runs = [
                {"run": str(run.path), "seed": run.seed, "epochs": run.epochs, "planned": run.planned, "finished": run.finished}
                | {"metrics": run.metrics, "card": None if run.card is None else run.card.plain()}
                for run in group.runs
            ]
            groups.append({"runs": runs, "metrics": spreads, "difference": pairs})
        return {"card": self.card, "groups": groups, "config_differences": self.config_differences()}


def compare_runs(paths: Sequence[Path]) -> Comparison:
    """Read runs and group those that differ in their seed only.

    Raises:
        InputError: one is no run, is named twice, has no configuration or no card, or their cards do not allow it.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("a run is named twice; name every run once")
    runs = [_measured(read_run(path, with_gallery=False)) for path in paths]
    card = _common(runs)
    groups: dict[str, list[Group]] = {}
    for run in runs:
        alike = groups.setdefault(json.dumps(run.config, sort_keys=True), [])
        # The same configuration and seed once more, as with other code, is no further seed.
        place = next((group for group in alike if run.seed not in [other.seed for other in group.runs]), None)
        if place is None:
            alike.append(Group([run]))
        else:
            place.runs.append(run)
    order = {run.path: at for at, run in enumerate(runs)}
    every = [group for alike in groups.values() for group in alike]
    return Comparison(sorted(every, key=lambda group: order[group.runs[0].path]), card)


def _measured(run: RunRecord) -> Measured:
    if not run.config:
        raise InputError(f"{run.path} has no config.yaml, so nobody knows what it is to be compared as; put it back, or leave the run out")
    result, card = run.result(), run.card()
    if result and card is None:
        raise InputError(
            f"the numbers of {run.path} have no card, so nobody knows what they stand on: an older version measured them; "
            "leave the run out, or train it again"
        )
    # Counts are whole numbers, metrics are not; of the deviations over a protocol's trials there is no deviation over seeds.
    metrics = {
        name: float(value)
        for name, value in result.items()
        if isinstance(value, float) and number(value) is not None and not name.startswith("validation/") and not name.endswith("_std")
    }
    planned, seed = run.setting("schedule.epochs"), run.setting("run.seed")
    return Measured(
        run.path,
        {key: value for key, value in dotted(run.config) if key.partition(".")[0] not in _FREE_SECTIONS and key not in MACHINE_KEYS},
        card,
        metrics,
        card.seed if card else seed if isinstance(seed, int) else None,
        max((line["epoch"] for line in run.of("evaluation")), default=0),
        planned if isinstance(planned, int) else None,
    )


def _common(runs: Sequence[Measured]) -> dict[str, Any]:
    """What all numbers stand on.

    Raises:
        InputError: they stand on different things.
    """
    cards = [(run.path, {key: value for key, value in run.card.plain().items() if key not in FREE}) for run in runs if run.card]
    if not cards:
        raise InputError("no run was evaluated so far; wait for the first evaluation")
    first_path, first = cards[0]
    differences = []
    for path, card in cards[1:]:
        for key, value in card.items():
            if value != first[key]:
                differences.append(f"  {key}: {shorten(first[key])} in {first_path}, {shorten(value)} in {path}")
    if differences:
        raise InputError(
            "these runs cannot be compared, their numbers stand on different things:\n" + "\n".join(differences) + "\n"
            "leave runs out, or measure them alike: same data, data.protocol, evaluation.recall_at, evaluation.select_on, embedding width"
        )
    return first


def table(found: Comparison) -> str:
    """A comparison for the terminal."""
    names = [f"#{place}" for place, _ in enumerate(found.groups, 1)]
    lines = []
    for name, group in zip(names, found.groups, strict=True):
        seeds = ", ".join("?" if run.seed is None else str(run.seed) for run in group.runs)
        runs = ", ".join(f"{run.path}{'' if run.finished else '*'}" for run in group.runs)
        lines.append(f"{name}  seed{'s' if len(group.runs) > 1 else ''} {seeds}: {runs}")
    for run in (run for group in found.groups for run in group.runs if not run.finished):
        lines.append(f"  * {run.path} is not finished: {run.epochs} of {run.planned or '?'} epochs are measured")
    first, rest = found.groups[0], found.groups[1:]
    head = ["", *names, *(f"{name} - #1, same seeds" for name in names[1:])]
    rows = [head]
    for name in found.metrics:
        pairs = [
            _told(spread, "+") + (f" (n={spread.n})" if spread else "") for group in rest for spread in [group.difference(first, name)]
        ]
        rows.append([name, *(_told(group.spread(name)) for group in found.groups), *pairs])
    lines += ["", *_columns(rows)]
    if differences := found.config_differences():
        lines += ["", "What differs in the configurations:"]
        lines += _columns([["", *names], *([key, *map(_value, values)] for key, values in differences.items())])
    elif rest:
        lines += ["", "The configurations are the same."]
    commits = {run.card.commit or run.card.version for group in found.groups for run in group.runs if run.card}
    if len(commits) > 1:
        lines += ["", f"Measured by different code: {', '.join(sorted(commits))}"]
    lines += ["", f"All numbers stand on this {CARD}:", *_columns([[key, _value(value)] for key, value in found.card.items()])]
    return "\n".join(map(printable, lines))


def _told(spread: Spread | None, sign: str = "") -> str:
    if spread is None:
        return "-"
    return f"{spread.mean:{sign}.4f}" + ("" if spread.std is None else f" ± {spread.std:.4f}")


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
