"""Processes of this machine that wait until they are asked for training steps: several as the ranks of one training, or each alone."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.engine_step import EngineStep
from benchmarks.scaling_model import StepTimes
from benchmarks.scaling_step import CLASSES, LR, noise, step_times
from dnc_dist.config import RunConfig
from dnc_dist.data.loading import Batch
from dnc_dist.doctor.network import check_network
from dnc_dist.processes import distributed
from dnc_dist.processes.cores import usable_cores


class StepSeconds(NamedTuple):
    """Seconds of one step of a rank: in all, in the collectives of loss and statistics, and in those of the engine, with all waiting."""

    total: float
    loss_collectives: float
    engine_collectives: float


class Processes:
    """So many processes with one thread each, on a core of its own while there are enough, which stay idle between two questions.

    Args:
        count: of the processes.
        cfg: what they train; its data is not read.
        together: as the ranks of one training; else each is a training of its own.
    """

    def __init__(self, count: int, cfg: RunConfig, *, together: bool) -> None:
        self._context = multiprocessing.get_context("spawn")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self._pipes, cores = [], sorted(usable_cores())
        for number in range(count):
            rank, world = (number, count) if together else (0, 1)
            mine, theirs = self._context.Pipe()
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            self._context.Process(target=_serve, args=(theirs, cfg, variables, cores[number % len(cores)]), daemon=True).start()
            theirs.close()
            self._pipes.append(mine)

    def ask(self, what: str, *args: Any, of: int | None = None) -> list[Any]:
        """What a method of ``_Rank`` gives on each process, or only on the first ``of`` of them, which work side by side.

        Raises:
            SystemExit: a process has ended; it has printed why.
        """
        asked = self._pipes[:of]
        try:
            for pipe in asked:
                pipe.send((what, args))
            return [pipe.recv() for pipe in asked]
        except (EOFError, ConnectionError):
            raise SystemExit("a process has ended, see above") from None

    def close(self) -> None:
        """Let them end."""
        for pipe in self._pipes:
            pipe.close()


class _Rank:
    """What a process can be asked for."""

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg, self.number, self.collectives = cfg, 0, _Collectives()
        self.engine: EngineStep | None = None
        self.batches: dict[int, Batch] = {}

    def times(self, rows: list[int], calls: int, steps: int) -> StepTimes:
        """Of the step of this process alone."""
        return step_times(self.cfg, rows, calls=calls, steps=steps)

    def network(self) -> list[tuple[str, int, float]]:
        """Collective. Operations, their bytes and their seconds."""
        found = check_network().values["network"]["collectives"]
        return [(one["operation"], one["bytes"], 1e-6 * one["microseconds"]) for one in found]

    def steps(self, rows: int, count: int) -> list[StepSeconds]:
        """Collective. So many steps, after one that warms up."""
        step = self.engine = self.engine or EngineStep(self.cfg, CLASSES, lr=LR)
        batch = self.batches.setdefault(rows, noise(self.cfg, rows))
        found, seconds = [], self.collectives.seconds
        for _ in range(1 + count):
            seconds.update(loss=0.0, engine=0.0)
            started = time.perf_counter()
            with self.collectives.of("loss"):
                loss = step.forward(batch, self.number)
            with self.collectives.of("engine"):
                step.engine.backward(loss)
                step.update()
            found.append(StepSeconds(time.perf_counter() - started, seconds["loss"], seconds["engine"]))
            self.number += 1
        return found[1:]


class _Collectives:
    """Seconds in collectives of torch, by what they are for. Made before DeepSpeed's first engine, which keeps the functions it finds."""

    def __init__(self) -> None:
        self.seconds = {"loss": 0.0, "engine": 0.0, "others": 0.0}
        self._now = "others"
        for place, name in (
            (dist, "all_reduce"),
            (dist, "all_gather_into_tensor"),
            (distributed, "_all_gather_single"),
        ):
            setattr(place, name, self._timed(getattr(place, name)))

    @contextmanager
    def of(self, purpose: str) -> Iterator[None]:
        """What is called meanwhile is for this."""
        self._now = purpose
        yield
        self._now = "others"

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            found = function(*args, **kwargs)
            self.seconds[self._now] += time.perf_counter() - started
            return found

        return call


def _serve(pipe: Connection, cfg: RunConfig, variables: dict[str, Any], core: int) -> None:
    # Before torch and gloo start threads. A kernel that moves the ranks about lets them share one core at times while another is idle.
    os.sched_setaffinity(0, {core})
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    distributed.init()
    rank = _Rank(cfg)
    while True:
        try:
            what, args = pipe.recv()
        except EOFError:  # the other end has been closed
            return
        pipe.send(getattr(rank, what)(*args))
