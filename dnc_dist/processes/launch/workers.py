"""A launch from its start to its exit code."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from dnc_dist import __version__
from dnc_dist.base.errors import EXIT_FAILED, EXIT_STOPPED, InputError, Stopped
from dnc_dist.base.foreign import read_json
from dnc_dist.processes.cores import quota, usable_cores
from dnc_dist.processes.launch.agent import Agent, Work
from dnc_dist.processes.launch.console import say
from dnc_dist.processes.launch.network import interface_settings
from dnc_dist.processes.launch.peers import Alone, MeetingError, Peers
from dnc_dist.processes.launch.secret import Secret
from dnc_dist.processes.launch.verdict import Failure, LaunchReport, verdict
from dnc_dist.processes.signals import STOP_SIGNALS
from dnc_dist.processes.worker import LAUNCHER_PID, STOP_TIMEOUT_SECONDS

WORKERS_WITHOUT_GPU = 2
# What a machine may take to report, once its workers should have ended.
_REPORT_SECONDS = 15.0
# Of a message, a traceback or the end of an output, as other machines hear of it.
_MOST_CHARACTERS = 1 << 14


def workers_here(nproc: int | None) -> int:
    """How many workers to start on this machine: as many as wanted, else one per GPU, without a GPU two.

    Two, so that a trial on the CPU takes the ways of a run on many GPUs; not one per core, as memory and rounding would then
    depend on the machine.

    Raises:
        InputError: there are GPUs, but fewer than workers wanted.
    """
    gpus = _gpus()
    if nproc and 0 < gpus < nproc:
        raise InputError(
            f"--nproc {nproc}, but torch sees {gpus} GPU(s) here, and every worker needs one of its own; use at most {gpus}, "
            "or set CUDA_VISIBLE_DEVICES to nothing for a run on the CPU"
        )
    return nproc or gpus or WORKERS_WITHOUT_GPU


def _gpus() -> int:
    """GPUs of this machine that torch can use. Without a driver there is none: then torch, which takes seconds to import, is not asked."""
    if not _has_driver():
        return 0
    import torch

    # The count alone knows the GPUs of a driver that is too old for this torch, too; the workers of such a machine use the CPU.
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _has_driver() -> bool:
    """Whether there is a driver of AMD's GPUs or, as CUDA looks for it, of NVIDIA's."""
    if Path("/dev/kfd").exists():
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def launch_workers(
    command: Sequence[str],
    nproc: int,
    *,
    nnodes: int = 1,
    rendezvous: str = "",
    secret_file: Path | None = None,
    wait: float = 600.0,
    terms: Mapping[str, Any] | None = None,
    stop_timeout: float = STOP_TIMEOUT_SECONDS,
    failure_grace: float = 2.0,
) -> int:
    """Run ``command`` as ``nproc`` workers of this machine and return the exit code of the whole.

    Args:
        command: program and arguments of one worker.
        nproc: workers on this machine, and on each other one.
        nnodes: machines that take part.
        rendezvous: HOST:PORT where they meet, if there are several: an address of one of them and a free port.
        secret_file: where the machine of that address leaves the secret of this launch for the others, in a folder that they share;
            not needed if DNC_LAUNCH_SECRET is set on all of them.
        wait: seconds until the last machine must have come.
        terms: what else must be the same on all machines, by name.
        stop_timeout: seconds that workers have to save after a stop was requested.
        failure_grace: seconds in which the peers of a failed worker may end by themselves.

    Returns:
        0 done, 1 failed, 2 wrong input, 75 stopped on request: the same on all machines; the cause has been printed on stderr.

    Raises:
        InputError: the machines cannot meet at that address, or do not start the same.
    """
    cores = len(usable_cores()) if (limit := quota()) is None else min(len(usable_cores()), limit)
    environment = {
        LAUNCHER_PID: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, int(cores // nproc)))),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
    shared = Secret(secret_file) if nnodes > 1 else nullcontext()
    with tempfile.TemporaryDirectory(prefix="dnc-dist-launch-") as name, _handling_signals() as ignored, shared as secret:
        try:
            same = {"--nnodes": nnodes, "--nproc": nproc, **(terms or {})}
            peers: Peers = Alone(nproc) if secret is None else _meet(rendezvous, nnodes, same, wait, secret)
        except Stopped as error:
            say(f"stopped: {error}")
            return EXIT_STOPPED
        except MeetingError as error:
            say(f"error: {error}")
            return EXIT_FAILED
        # However it ends, the others shall not wait for this machine.
        with closing(peers):
            if nnodes > 1:
                interfaces = interface_settings(peers.address)
                environment |= interfaces
                say(_place(peers, nproc, interfaces))
            work = Work(command, nproc, environment, Path(name))
            agent = Agent(work, peers, ignored, stop_timeout, failure_grace)
            for number in STOP_SIGNALS:
                signal.signal(number, agent.on_signal)
            try:
                agent.run()
            finally:
                agent.end()
            whole = _conclude(agent, peers, _report(agent.codes, Path(name)))
    hosts = {rank: machine for number, machine in enumerate(peers.machines) for rank in range(number * nproc, (number + 1) * nproc)}
    code, message = verdict(whole, stopping=agent.stopping, hosts=hosts if nnodes > 1 else {})
    if message:
        say(message)
    return code


def _meet(rendezvous: str, nnodes: int, terms: Mapping[str, Any], wait: float, secret: Secret) -> Peers:
    """The other machines, once all have come; what each starts, and with which versions, is the same."""
    # Only now: a machine alone starts its workers without either.
    import torch

    from dnc_dist.processes.launch.meeting import meet

    versions = {"dnc-dist": __version__, "Python": platform.python_version(), "torch": torch.__version__}
    return meet(rendezvous, nnodes, versions | dict(terms), wait, secret)


def _place(peers: Peers, nproc: int, interfaces: Mapping[str, str]) -> str:
    """One line about this machine among the others."""
    first, machines = peers.number * nproc, len(peers.machines)
    ranks = f"rank {first}" if nproc == 1 else f"ranks {first}-{first + nproc - 1}"
    settings = ", ".join(f"{name} {value}" for name, value in interfaces.items())
    shown = "" if peers.number == 0 else f"; rank 0 writes on {peers.machines[0]}"
    return f"{peers.machines[peers.number]}: machine {peers.number + 1} of {machines}, {ranks} of {machines * nproc}; {settings}{shown}"


@contextmanager
def _handling_signals() -> Iterator[set[int]]:
    """Signals end the launch before there are workers; yields those that were ignored, as SIGHUP is under nohup."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    ignored = {int(number) for number, handler in before.items() if handler is signal.SIG_IGN}

    def stop(number: int, frame: FrameType | None) -> None:
        if number not in ignored:
            raise Stopped(f"{signal.Signals(number).name} before the workers were started")

    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    try:
        yield ignored
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(codes: dict[int, int | None], folder: Path) -> LaunchReport:
    """How the workers of this machine ended."""
    errors, tails = {}, {}
    for rank, code in codes.items():
        tail = _tail(folder / f"{rank}.err")
        try:
            if (record := folder / f"{rank}.json").exists():
                error = read_json(record, Failure)
                errors[rank] = replace(error, message=error.message[:_MOST_CHARACTERS], traceback=error.traceback[-_MOST_CHARACTERS:])
        except InputError as damage:
            tail = f"{tail}\n{damage}".lstrip()
        if code and rank not in errors and tail:
            tails[rank] = tail
    return LaunchReport(codes, errors, tails)


def _tail(path: Path, lines: int = 30) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])[-_MOST_CHARACTERS:] if path.exists() else ""


def _conclude(agent: Agent, peers: Peers, report: LaunchReport) -> LaunchReport:
    """Wait for the other machines, as long as nothing says that they should have ended; then how all ended, as far as is known."""
    peers.tell(report)
    while (whole := peers.verdict()) is None:
        agent.exchange()
        if time.monotonic() > agent.give_up + _REPORT_SECONDS:
            return report | LaunchReport(lost={"other machines": f"no report within {_REPORT_SECONDS:.0f} s"})
        time.sleep(0.02)
    return whole
