"""The doctor's command on several ranks, and what it answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.run_fixtures import Done, start
from tests.spawn import free_port


def ranks(
    *arguments: str | Path,
    folder: Path,
    world: int = 2,
    before: Callable[[], None] | None = None,
    env_of_1: Mapping[str, str] | None = None,
) -> list[Done]:
    """``dnc-dist doctor ARGUMENTS`` on so many ranks, as srun and torchrun start them."""
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **((env_of_1 or {}) if rank == 1 else {})}
        running.append(start(["doctor", *arguments], folder, env=place | own, before=before))
    return [process.wait() for process in running]


ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def found(done: Done, code: int = 0) -> dict[str, Any]:
    """The JSON object, which is all of stdout."""
    assert done.code == code, done
    assert done.out.count("\n") == 1, done.out
    values = json.loads(done.out)
    assert values["passed"] == (code == 0)
    assert (code == 0) == all(check["status"] != "failed" for check in values["checks"])
    return values


def row(values: dict[str, Any], name: str) -> dict[str, Any]:
    return next(check for check in values["checks"] if check["name"] == name)
