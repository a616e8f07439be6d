"""Network: how fast the ranks add up and gather, how fast their store answers, and whether the results are right."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from dnc_dist.base.progress import Progress
from dnc_dist.doctor.table import Check, Section
from dnc_dist.processes import distributed

# Bytes of the whole result, and how often each is measured. gloo, which serves CPUs, stops earlier.
_SIZES = {1 << 10: 50, 1 << 15: 50, 1 << 20: 20, 1 << 24: 7, 1 << 26: 7}
_LARGEST_OF_GLOO = 1 << 24
_WARM_UP = 3
_STORE_REPEATS = 50


class Measurement(NamedTuple):
    """The slowest rank's median of one operation; ``gb_per_s`` is the bus bandwidth, ``right`` whether every rank got the right numbers."""

    operation: str
    bytes: int
    microseconds: float
    gb_per_s: float
    right: bool


def check_network() -> Section:
    """Collective. Latency and bus bandwidth of all-reduce and all-gather for several sizes, and the latency of the store."""
    world, backend = distributed.world_size(), dist.get_backend()
    sizes = {size: repeats for size, repeats in _SIZES.items() if backend != "gloo" or size <= _LARGEST_OF_GLOO}
    found = []
    with Progress(distributed.is_main()).phase("network", 2 * len(sizes), "measurements") as phase:
        for measure in (_all_reduce, _all_gather):
            for size, repeats in sizes.items():
                found.append(measure(size, repeats))
                phase.update()
    store = max(distributed.gather_objects(_store_latency()))
    checks = [
        Check(
            f"{one.operation} {_size(one.bytes)}",
            f"{one.microseconds:>9,.0f} µs {one.gb_per_s:>8.3f} GB/s",
            "ok" if one.right else "failed",
            "" if one.right else f"a rank received wrong numbers over {backend}: suspect memory, network card, driver or library",
        )
        for one in found
    ]
    checks.append(Check("store, set and get", f"{store:>9,.0f} µs"))
    note = (
        f"{world} ranks over {backend}; GB/s: bus bandwidth, bytes x 2(W-1)/W / time for all-reduce, bytes x (W-1)/W / time for all-gather"
    )
    values = {"backend": backend, "store_microseconds": store, "collectives": [one._asdict() for one in found]}
    return Section("network", note, checks, {"network": values})


def _all_reduce(size: int, repeats: int) -> Measurement:
    """Sums of ``size`` bytes of ones."""
    world = distributed.world_size()
    tensor = torch.ones(size // 4, device=distributed.device())
    dist.all_reduce(tensor)
    right = bool((tensor == world).all())
    tensor.zero_()  # sums in place would grow with every repetition
    seconds = _median(lambda: dist.all_reduce(tensor), repeats)
    return _measurement("all-reduce", size, seconds, 2 * (world - 1) / world, right)


def _all_gather(size: int, repeats: int) -> Measurement:
    """Parts that together make up ``size`` bytes; each holds its rank."""
    world, rank = distributed.world_size(), distributed.rank()
    count = max(1, size // 4 // world)
    part = torch.full((count,), float(rank), device=distributed.device())
    parts = [torch.empty_like(part) for _ in range(world)]
    seconds = _median(lambda: dist.all_gather(parts, part), repeats)
    right = all(bool((received == sender).all()) for sender, received in enumerate(parts))
    return _measurement("all-gather", 4 * count * world, seconds, (world - 1) / world, right)


def _measurement(operation: str, size: int, seconds: float, share: float, right: bool) -> Measurement:
    slowest = max(distributed.gather_objects(seconds))
    return Measurement(operation, size, slowest * 1e6, size * share / slowest / 1e9, not distributed.any_rank(not right))


def _median(operation: Callable[[], object], repeats: int) -> float:
    """Seconds; every repetition begins when all ranks are there."""
    seconds = []
    for number in range(_WARM_UP + repeats):
        distributed.any_rank(False)
        started = time.perf_counter()
        operation()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= _WARM_UP:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _store_latency() -> float:
    """Microseconds that this rank waits for a value that it has just written."""
    store, key = _get_default_store(), f"doctor/{distributed.rank()}"
    seconds = []
    for number in range(_STORE_REPEATS):
        started = time.perf_counter()
        store.set(key, str(number))
        store.get(key)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e6


def _size(size: int) -> str:
    return f"{size / 2**20:.0f} MB" if size >= 1 << 20 else f"{size / 2**10:.0f} KB"
