"""torchrun's elastic agent: it starts the workers, gives them time to end by themselves, and hears of failures on other machines."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import HashStore
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.api import LogsDest
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from dnc_dist.base.errors import EXIT_STOPPED
from dnc_dist.processes.launch.console import say
from dnc_dist.processes.launch.peers import Alarm, Peers
from dnc_dist.processes.worker import ERROR_FILE

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class WorkerOutput(LogsSpecs):
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


class Known(RendezvousHandler):
    """A rendezvous for machines that have met already: it only hands on where workers find their store."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    @property
    def use_agent_store(self) -> bool:
        """The store is in the launcher of machine 0; workers connect to it."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """The number of this machine, and the workers' store; the agent itself needs none."""
        return RendezvousInfo(HashStore(), self._peers.number, len(self._peers.machines), RendezvousStoreInfo(*self._peers.store))

    def get_backend(self) -> str:
        """A name for torch's log."""
        return "dnc-dist"

    def get_run_id(self) -> str:
        """A name for the workers' environment."""
        return "dnc-dist"

    def is_closed(self) -> bool:
        """Nobody comes or goes after the start."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def num_nodes_waiting(self) -> int:
        """Nobody comes after the start."""
        return 0

    def shutdown(self) -> bool:
        """Nothing to close."""
        return True


class Agent(LocalElasticAgent):
    """torchrun's agent with patience: failed or stopping workers may end by themselves before the rest is ended.

    ``codes`` are the exit codes that the ranks had of their own; None for those that had to be ended. ``stopping`` says
    whether a stop was requested, here or on another machine.

    Args:
        spec: the agent's own.
        output: where workers write.
        peers: the other machines.
        ignored: signals that the launcher does not act on.
        stop_timeout: seconds that workers have to save after a stop was requested.
        failure_grace: seconds in which the peers of a failed worker may end by themselves.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        output: WorkerOutput,
        peers: Peers,
        ignored: Collection[int],
        stop_timeout: float,
        failure_grace: float,
    ) -> None:
        super().__init__(spec, output)
        self._peers, self._ignored = peers, ignored
        self._stop_timeout, self._failure_grace = stop_timeout, failure_grace
        self._signal = ""
        self._warned: set[bool] = set()
        self.give_up = float("inf")
        self.stopping = False
        self.codes: dict[int, int | None] = {}
        self.pids: list[int] = []

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask the workers to save and stop; a second Ctrl-C ends them."""
        if number in self._ignored:
            return
        if self._signal and number == signal.SIGINT:
            self.give_up = time.monotonic()
        if self.stopping:
            return
        self._signal = signal.Signals(number).name
        hint = "; Ctrl-C again ends them at once" if number == signal.SIGINT else ""
        say(f"{self._signal}: the workers save and stop (at most {self._stop_timeout:.0f} s){hint}")
        self._stop(self._stop_timeout)

    def _stop(self, seconds: float) -> None:
        self.stopping = True
        self.give_up = min(self.give_up, time.monotonic() + seconds)
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def exchange(self) -> None:
        """Tell the other machines what happened here, and act on what happened there."""
        if self._signal and True not in self._warned:
            self._warn(Alarm(f"{self._peers.machines[self._peers.number]}: {self._signal}", stop=True, seconds=self._stop_timeout))
        for alarm in self._peers.alarms():
            if alarm.stop and not self.stopping:
                say(f"{alarm.text}; the workers save and stop (at most {alarm.seconds:.0f} s)")
                self._stop(alarm.seconds)
            else:
                self.give_up = min(self.give_up, time.monotonic() + alarm.seconds)

    def _warn(self, alarm: Alarm) -> None:
        if alarm.stop not in self._warned:
            self._warned.add(alarm.stop)
            self._peers.raise_alarm(alarm)

    def _assign_worker_ranks(self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec) -> list[Worker]:
        # Every machine has as many workers as this one, so nobody needs to be asked.
        local, total = spec.local_world_size, group_world_size * spec.local_world_size
        ranks = range(group_rank * local, (group_rank + 1) * local)
        return [Worker(number, rank, rank, total, total) for number, rank in enumerate(ranks)]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        self.pids = list(started.values())
        # Starting workers installs the agent's own handlers, which end them after 30 seconds.
        for number in STOP_SIGNALS:
            signal.signal(number, self.on_signal)
        if self.stopping:
            self._stop(self._stop_timeout)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        handlers = self._pcontext.subprocess_handlers  # type: ignore[union-attr]
        codes = {worker.global_rank: handlers[worker.local_rank].proc.poll() for worker in worker_group.workers}
        self.exchange()
        failed = [code for code in codes.values() if code]
        if failed:
            # Peers of a worker that stopped on request are still saving; peers of a failed one find out soon, or hang in a collective.
            only_stopped = all(code == EXIT_STOPPED for code in failed)
            seconds = self._stop_timeout if only_stopped else self._failure_grace
            self.give_up = min(self.give_up, time.monotonic() + seconds)
            if not self.stopping or not only_stopped:
                self._warn(Alarm(f"{self._peers.machines[self._peers.number]}: the workers there stop", only_stopped, seconds))
        running = None in codes.values()
        if running and time.monotonic() < self.give_up:
            return RunResult(state=WorkerState.HEALTHY)
        self.codes = self.codes or codes
        if running:
            self._shutdown(signal.SIGKILL, timeout=10)
        return super()._monitor_workers(worker_group)

    def _exit_barrier(self) -> None:
        """Nothing: the launcher itself waits for what other machines report."""

    def kill_leftovers(self) -> None:
        """End what workers left behind, such as the loader processes of a killed one; each worker leads its own process group."""
        for pid in self.pids:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
