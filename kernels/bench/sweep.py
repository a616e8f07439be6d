"""Is there a better tile than the default? A search from the default to the best of its neighbours, up to STEPS times.

Every kernel with a choice has a function that makes it, `module.chooser(...)`. It gives a dictionary or named tuple of powers
of two (stages: any number), or None where another kernel serves. The search replaces that function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

from torch import Tensor

from bench import measure

STEPS = 4  # of the walk, at most
STAGES = "num_stages"
TOLERANCE = 1e-2  # a tile may move a draw or a row between near ties; a wrong one moves everything


def numbers(tile: Any) -> dict[str, int]:
    return dict(tile if isinstance(tile, dict) else tile._asdict())


def neighbours(tile: Any) -> Iterator[Any]:
    """Tiles that differ in one number: half or double, one stage fewer or more."""
    for name, value in numbers(tile).items():
        for other in (value - 1, value + 1) if name == STAGES else (value // 2, 2 * value):
            if other >= 1:
                yield type(tile)(**numbers(tile) | {name: other})


def same(values: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Is every tensor near what the default tile gives?"""
    pairs = zip(values, expected, strict=True)
    return all(bool((value.double() - right.double()).norm() <= TOLERANCE * right.double().norm()) for value, right in pairs)


def walk(module: ModuleType, chooser: str, step: Callable[[], tuple[Tensor, ...]], run: measure.Run, facts: dict[str, Any]) -> None:
    """Time `step` with one tile after the other; a row each, also for tiles that do not compile, fit or compute the same."""
    original = getattr(module, chooser)
    used: list[Any] = []

    def chosen(*args: Any) -> Any:
        used.append(original(*args))
        return used[-1]

    with mock.patch.object(module, chooser, chosen):
        expected = tuple(value.clone() for value in step())
    if not used or used[-1] is None:
        return
    facts = facts | {"implementation": "sweep", "kernel": f"{module.__name__.split('.')[-1]}.{chooser}"}

    def timed(tile: Any) -> float:
        def measured() -> dict[str, Any]:
            with mock.patch.object(module, chooser, lambda *args: tile):
                if not same(step(), expected):
                    raise ValueError("another result than with the default tile")
                return measure.time_phases({"step": step}, run.device, run.seconds / 2)

        found = run.row(facts | {"tile": numbers(tile)}, measured)
        return found["full_ms"][0] if found["outcome"] == "ok" else float("inf")

    best, times = used[-1], {}
    times[tuple(numbers(best).values())] = timed(best)
    for _ in range(STEPS):
        start = best
        for tile in neighbours(start):
            key = tuple(numbers(tile).values())
            if key not in times:
                times[key] = timed(tile)
            if times[key] < times[tuple(numbers(best).values())]:
                best = tile
        if best is start:
            break
    fastest = times[tuple(numbers(best).values())]
    if fastest < float("inf"):
        run.write(facts | {"outcome": "best", "tile": numbers(best), "full_ms": [fastest]})
