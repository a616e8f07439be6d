"""Run a function on W real gloo processes; a hang or an error on any of them fails the test."""

from __future__ import annotations

import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from dnc_dist.processes import distributed
from tests.process_server import SERVER


def _worker(
    rank: int,
    world_size: int,
    port: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    out: str,
    environment: dict[str, str],
) -> None:
    # The server's own environment is that of the first test.
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    try:
        distributed.init(timeout_seconds=60)
        # A rank whose function ends at once would reset the connections that a slower one is still opening.
        distributed.barrier()
        torch.save((True, function(*args)), f"{out}/{rank}.part")
    except BaseException:
        torch.save((False, traceback.format_exc()), f"{out}/{rank}.part")
    os.rename(f"{out}/{rank}.part", f"{out}/{rank}")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def spawn(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """The results of ``function(*args)`` on each of ``world_size`` ranks.

    Raises:
        AssertionError: a rank raised (its traceback is shown), died, or was not done after ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as out:
        port = free_port()
        workers = [
            SERVER.Process(target=_worker, args=(rank, world_size, port, function, args, out, dict(os.environ)), daemon=False)
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + timeout
        try:
            while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
                time.sleep(0.02)
                if any(worker.exitcode not in (None, 0) for worker in workers):
                    break
            hanging = [rank for rank, worker in enumerate(workers) if worker.is_alive() and not os.path.exists(f"{out}/{rank}")]
        finally:
            for worker in workers:
                worker.kill() if worker.is_alive() else None
                worker.join()
        results = {rank: torch.load(f"{out}/{rank}", weights_only=False) for rank in range(world_size) if os.path.exists(f"{out}/{rank}")}
    errors = [f"rank {rank}:\n{value}" for rank, (ok, value) in results.items() if not ok]
    assert not errors, "\n".join(errors)
    assert len(results) == world_size, f"ranks without a result: {sorted(set(range(world_size)) - set(results))}; still running: {hanging}"
    return [results[rank][1] for rank in range(world_size)]
