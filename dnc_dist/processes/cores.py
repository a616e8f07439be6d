"""How many processor cores there are for this process and for each rank, and how many loader processes follow from that."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

MOST_LOADERS = 16
"""Of a rank, unless somebody asks for more: each keeps batches ready, and memory for them."""
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> frozenset[int]:
    """Numbers of the cores that this process may run on."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def quota(file: Path = _QUOTA) -> float | None:
    """How many cores' time this container may use (`docker run --cpus`); None: as much as there is."""
    try:
        limit, period = file.read_text().split()
    except (OSError, ValueError):  # no control groups, or the older ones
        return None
    return None if limit == "max" else int(limit) / int(period)


def loader_processes(wanted: int | Literal["auto"]) -> int:
    """Collective. What ``data.workers`` means here; the same on all ranks, since passes over a data set are cut by it.

    Args:
        wanted: a number, or auto: with GPUs, the cores of a rank on the machine that has fewest of them, less one for the training
            process; without, one, as there the network keeps the cores busy. At least 1, at most ``MOST_LOADERS``.
    """
    from dnc_dist.processes import distributed  # not for the launcher, which only counts cores: this brings torch

    found = distributed.gather_objects((socket.gethostname(), usable_cores(), quota()))
    return wanted if wanted != "auto" else loaders_of(cores_per_rank(found), on_gpu=distributed.device().type == "cuda")


def cores_per_rank(ranks: Iterable[tuple[str, frozenset[int], float | None]]) -> float:
    """Cores for each rank, on the machine that has fewest: ranks of one machine share those that any of them may use.

    Args:
        ranks: of each its machine, its cores and its quota.
    """
    machines: dict[str, list[tuple[frozenset[int], float | None]]] = {}
    for machine, cores, limit in ranks:
        machines.setdefault(machine, []).append((cores, limit))
    return min(_cores_of(here) / len(here) for here in machines.values())


def _cores_of(ranks: list[tuple[frozenset[int], float | None]]) -> float:
    """Of one machine."""
    together: set[int] = set().union(*(cores for cores, _ in ranks))
    return min([len(together), *(limit for _, limit in ranks if limit is not None)])


def loaders_of(cores: float, *, on_gpu: bool) -> int:
    """Loader processes of a rank with so many cores."""
    return max(1, min(MOST_LOADERS, int(cores) - 1)) if on_gpu else 1
