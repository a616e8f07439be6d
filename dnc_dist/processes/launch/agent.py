"""The agent of a machine: it starts its workers, gives them time to end by themselves, and hears of failures on other machines.

Workers find the variables that torchrun sets, and each leads a session of its own. The agent of torchrun itself would restart workers,
which a launch does not want, and is a part of torch: the workers would wait for seconds until the launcher has imported that.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from dnc_dist.base.errors import EXIT_STOPPED
from dnc_dist.processes.launch.console import say
from dnc_dist.processes.launch.peers import Alarm, Peers
from dnc_dist.processes.worker import ERROR_FILE

_LOOK_SECONDS = 0.1
# A killed process is gone at once, unless the kernel itself is stuck for it.
_END_SECONDS = 10.0


class Work(NamedTuple):
    """What a machine starts: ``nproc`` times ``command``, with variables beside torchrun's.

    Rank 0 writes to our stdout and stderr, the other ranks to files in ``folder``; every rank finds there the file for its error.
    """

    command: Sequence[str]
    nproc: int
    environment: Mapping[str, str]
    folder: Path


class Agent:
    """Starts workers and watches them: failed or stopping ones may end by themselves before the rest is ended.

    ``codes`` are the exit codes that the ranks had of their own; None for those that had to be ended. ``stopping`` says
    whether a stop was requested, here or on another machine.

    Args:
        work: what to start.
        peers: the other machines.
        ignored: signals that the launcher does not act on.
        stop_timeout: seconds that workers have to save after a stop was requested.
        failure_grace: seconds in which the peers of a failed worker may end by themselves.
    """

    def __init__(self, work: Work, peers: Peers, ignored: Collection[int], stop_timeout: float, failure_grace: float) -> None:
        self._work, self._peers, self._ignored = work, peers, ignored
        self._stop_timeout, self._failure_grace = stop_timeout, failure_grace
        self._signal = ""
        self._warned: set[bool] = set()
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        self.give_up = float("inf")
        self.stopping = False
        self.codes: dict[int, int | None] = {}

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
        for worker in self._workers.values():
            worker.send_signal(signal.SIGTERM)

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

    def run(self) -> None:
        """Start the workers, and watch them until the last one has ended."""
        # Every machine has as many workers as this one, so nobody needs to be asked.
        first = self._peers.number * self._work.nproc
        for rank in range(first, first + self._work.nproc):
            self._workers[rank] = self._start(rank)
        if self.stopping:
            # Those that were about to start when the signal came.
            self._stop(self._stop_timeout)
        else:
            self._peers.open_store()
        while not self._over():
            time.sleep(_LOOK_SECONDS)

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        with ExitStack() as files:
            output = [None if rank == 0 else files.enter_context(self._file(rank, stream).open("wb")) for stream in ("out", "err")]
            environment = os.environ | self._variables(rank)
            return subprocess.Popen(self._work.command, env=environment, stdout=output[0], stderr=output[1], start_new_session=True)

    def _file(self, rank: int, ending: str) -> Path:
        return self._work.folder / f"{rank}.{ending}"

    def _variables(self, rank: int) -> dict[str, str]:
        """Those of torchrun, and those of our own."""
        machines, count = len(self._peers.machines), self._work.nproc
        address, port = self._peers.store
        return {
            "RANK": str(rank),
            "ROLE_RANK": str(rank),
            "WORLD_SIZE": str(machines * count),
            "ROLE_WORLD_SIZE": str(machines * count),
            "LOCAL_RANK": str(rank % count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": str(self._peers.number),
            "GROUP_WORLD_SIZE": str(machines),
            "ROLE_NAME": "worker",
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_RUN_ID": "dnc-dist",
            "TORCHELASTIC_USE_AGENT_STORE": str(port > 0),
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
            ERROR_FILE: str(self._file(rank, "json")),
            **self._work.environment,
        }

    def _over(self) -> bool:
        """Whether all workers have ended; those that had time enough to do so are ended now."""
        codes = {rank: worker.poll() for rank, worker in self._workers.items()}
        self.exchange()
        failed = [code for code in codes.values() if code]
        if failed:
            # Peers of a worker that stopped on request are still saving; peers of a failed one find out soon, or hang in a collective.
            only_stopped = all(code == EXIT_STOPPED for code in failed)
            seconds = self._stop_timeout if only_stopped else self._failure_grace
            self.give_up = min(self.give_up, time.monotonic() + seconds)
            if not self.stopping or not only_stopped:
                self._warn(Alarm(f"{self._peers.machines[self._peers.number]}: the workers there stop", only_stopped, seconds))
        if None in codes.values() and time.monotonic() < self.give_up:
            return False
        self.codes = codes
        return True

    def end(self) -> None:
        """End the workers that are left, and what others left behind, such as the loader processes of a killed one."""
        for worker in self._workers.values():
            # Each leads its own process group.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.pid, signal.SIGKILL)
        deadline = time.monotonic() + _END_SECONDS
        for worker in self._workers.values():
            with suppress(subprocess.TimeoutExpired):
                worker.wait(max(0.0, deadline - time.monotonic()))
