"""Start the workers of one machine with torchrun's elastic agent, watch them, and explain once how they ended.

The agent brings the rendezvous, the ranks and the environment. What is added here: the first real error instead of every
rank's traceback, exit codes that pass through, signals that make the workers save first, and no process left behind.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import LogsDest
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from dnc_dist.errors import EXIT_FAILED, EXIT_INPUT, EXIT_STOPPED, Stopped
from dnc_dist.worker import ERROR_FILE, LAUNCHER_PID, STOP_TIMEOUT_SECONDS

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def default_nproc() -> int:
    """One worker per GPU; one without a GPU."""
    return max(1, torch.cuda.device_count())


def _say(text: str) -> None:
    """Write to stderr in a way that a signal handler may."""
    os.write(2, f"{text}\n".encode())


class _WorkerOutput(LogsSpecs):
    """Rank 0 writes to our stdout and stderr, the other ranks to files; every rank gets a file for its error."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        super().__init__(log_dir=str(folder))
        self._folder, self._environment = folder, environment

    @property
    def root_log_dir(self) -> str:
        """The folder of all files."""
        return str(self._folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Say where the output of each local rank goes, and complete its environment."""
        output: dict[str, dict[int, str]] = {"out": {}, "err": {}}
        for local, env in envs.items():
            rank = env["RANK"]
            env |= {**self._environment, ERROR_FILE: str(self._folder / f"{rank}.json")}
            for stream, paths in output.items():
                paths[local] = "" if rank == "0" else str(self._folder / f"{rank}.{stream}")
        # The agent's own error files stay unused: it cannot read ours.
        unused = {local: os.devnull for local in envs}
        return LogsDest(stdouts=output["out"], stderrs=output["err"], error_files=unused)


class _Agent(LocalElasticAgent):
    """torchrun's agent with patience: failed or stopping workers may end by themselves before the rest is ended.

    ``codes`` are the exit codes that the ranks had of their own; None for those that had to be ended.
    """

    def __init__(self, spec: WorkerSpec, logs_specs: LogsSpecs, stop_timeout: float, failure_grace: float) -> None:
        super().__init__(spec, logs_specs)
        self._stop_timeout, self._failure_grace = stop_timeout, failure_grace
        self._give_up = float("inf")
        # A launcher under nohup keeps ignoring SIGHUP.
        self._ignored = {number for number in _STOP_SIGNALS if signal.getsignal(number) is signal.SIG_IGN}
        self.stopping = False
        self.codes: dict[int, int | None] = {}
        self.pids: list[int] = []

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask the workers to save and stop; a second Ctrl-C ends them.

        Raises:
            Stopped: no worker runs yet.
        """
        name = signal.Signals(number).name
        if number in self._ignored:
            return
        if not self.pids:
            raise Stopped(f"{name} before the workers were started")
        if self.stopping and number == signal.SIGINT:
            self._give_up = time.monotonic()
        if self.stopping:
            return
        self.stopping = True
        self._give_up = time.monotonic() + self._stop_timeout
        hint = "; Ctrl-C again ends them at once" if number == signal.SIGINT else ""
        _say(f"{name}: the workers save and stop (at most {self._stop_timeout:.0f} s){hint}")
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        self.pids = list(started.values())
        # Starting workers installs the agent's own handlers, which end them after 30 seconds.
        _install(self.on_signal)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        handlers = self._pcontext.subprocess_handlers  # type: ignore[union-attr]
        codes = {worker.global_rank: handlers[worker.local_rank].proc.poll() for worker in worker_group.workers}
        failed = [code for code in codes.values() if code]
        now = time.monotonic()
        if failed:
            # Peers of a worker that stopped on request are still saving; peers of a failed one find out soon, or hang in a collective.
            only_stopped = all(code == EXIT_STOPPED for code in failed)
            self._give_up = min(self._give_up, now + (self._stop_timeout if only_stopped else self._failure_grace))
        running = None in codes.values()
        if running and now < self._give_up:
            return RunResult(state=WorkerState.HEALTHY)
        self.codes = self.codes or codes
        if running:
            self._shutdown(signal.SIGKILL if self.stopping else signal.SIGTERM, timeout=10)
        return super()._monitor_workers(worker_group)

    def kill_leftovers(self) -> None:
        """End what workers left behind, such as the loader processes of a killed one; each worker leads its own process group."""
        for pid in self.pids:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)


def _install(handler: Any) -> None:
    for number in _STOP_SIGNALS:
        signal.signal(number, handler)


@contextmanager
def _handling_signals(handler: Any) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    _install(handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def verdict(codes: Mapping[int, int | None], errors: Mapping[int, Mapping[str, Any]], *, stopping: bool = False) -> tuple[int, str]:
    """Exit code and message for the whole launch: the cause, not what it did to the other ranks.

    A worker that was killed or that left without a record of its error comes first, since a Python error elsewhere is then a
    consequence; then the earliest recorded error; then aborts, with which communication libraries react to lost peers.

    Args:
        codes: rank -> exit code (negative: killed by that signal; None: had to be ended).
        errors: rank -> the error that it recorded.
        stopping: whether a stop was requested; a worker that SIGTERM kills was then still starting.
    """
    failed = {rank: code for rank, code in codes.items() if code}
    if not failed and not (stopping and None in codes.values()):
        return 0, ""
    if not failed:
        stuck = ", ".join(str(rank) for rank, code in sorted(codes.items()) if code is None)
        return EXIT_FAILED, f"did not stop in time and was killed: rank {stuck}; --resume auto continues from the last checkpoint"
    if stopping and -signal.SIGTERM in failed.values():
        return EXIT_STOPPED, ""

    def order(rank: int) -> tuple[int, float, int]:
        code = failed[rank]
        if code == EXIT_STOPPED:
            return 4, 0.0, rank
        if rank in errors:
            return 2, errors[rank]["time"], rank
        return (3 if code == -signal.SIGABRT else 0 if code < 0 else 1), 0.0, rank

    rank = min(failed, key=order)
    code = failed[rank]
    if code == EXIT_STOPPED:
        return EXIT_STOPPED, ""
    if rank in errors and code == EXIT_INPUT:
        return EXIT_INPUT, f"error: {errors[rank]['message']}"
    if rank in errors:
        error = errors[rank]
        # The message of an error in a loader's process is that process's whole traceback, which has just been shown.
        *_, last = str(error["message"]).rstrip().splitlines() or [""]
        brief = last if "in DataLoader worker process" in error["message"] else f"{error['type']}: {error['message']}"
        return EXIT_FAILED, f"{error['traceback'].rstrip()}\nrank {rank} failed: {brief}"
    if code < 0:
        return EXIT_FAILED, f"rank {rank} was killed by {signal.Signals(-code).name}"
    return EXIT_INPUT if code == EXIT_INPUT else EXIT_FAILED, f"rank {rank} ended with exit code {code}"


def _tail(path: Path, lines: int = 30) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]) if path.exists() else ""


def launch_workers(
    command: Sequence[str],
    nproc: int,
    *,
    nnodes: int = 1,
    rendezvous: str | None = None,
    stop_timeout: float = STOP_TIMEOUT_SECONDS,
    failure_grace: float = 2.0,
) -> int:
    """Run ``command`` as ``nproc`` workers of this machine and return the exit code of the whole.

    Args:
        command: program and arguments of one worker.
        nproc: workers on this machine.
        nnodes: machines that take part.
        rendezvous: HOST:PORT where they meet; needed if there are several.
        stop_timeout: seconds that workers have to save after a stop was requested.
        failure_grace: seconds in which the peers of a failed worker may end by themselves.

    Returns:
        0 done, 1 failed, 2 wrong input, 75 stopped on request; the cause of 1 and 2 has been printed on stderr.
    """
    # The agent reports every worker's end in its own words; ours follow, once.
    elastic = logging.getLogger("torch.distributed.elastic")
    elastic.addHandler(logging.NullHandler())
    elastic.propagate = False
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {
        LAUNCHER_PID: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // nproc))),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=rendezvous or "localhost:0",
        run_id="dnc-dist" if rendezvous else str(uuid.uuid4()),
        min_nodes=nnodes,
        max_nodes=nnodes,
        local_addr="localhost" if nnodes == 1 else None,
    )
    with tempfile.TemporaryDirectory(prefix="dnc-dist-launch-") as name:
        folder = Path(name)
        try:
            handler = get_rendezvous_handler(parameters)
            spec = WorkerSpec(
                role="worker",
                local_world_size=nproc,
                entrypoint=command[0],
                args=tuple(command[1:]),
                rdzv_handler=handler,
                max_restarts=0,
                monitor_interval=0.1,
                local_addr=parameters.local_addr,
            )
            agent = _Agent(spec, _WorkerOutput(folder, environment), stop_timeout, failure_grace)
            with _handling_signals(agent.on_signal):
                try:
                    agent.run()
                finally:
                    agent.kill_leftovers()
                    handler.shutdown()
        except (Stopped, SignalException) as error:
            _say(f"stopped: {error}")
            return EXIT_STOPPED
        except RendezvousError as error:
            _say(f"the machines did not meet at {parameters.endpoint} (--rdzv) with --nnodes {nnodes}: {error}")
            return EXIT_FAILED
        errors = {rank: json.loads(file.read_text()) for rank in agent.codes if (file := folder / f"{rank}.json").exists()}
        code, message = verdict(agent.codes, errors, stopping=agent.stopping)
        if message:
            blamed = [rank for rank in agent.codes if rank not in errors and message.startswith(f"rank {rank} ")]
            _say("\n".join(part for part in (*(_tail(folder / f"{rank}.err") for rank in blamed), message) if part))
            if nnodes > 1 and code == EXIT_FAILED:
                _say("a worker on another machine may have failed first: see the output there")
        return code
