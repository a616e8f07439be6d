"""What one worker process owes the launcher that started it: a record of its error, and an end when the launcher is gone."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from dnc_dist.base.errors import EXIT_FAILED, EXIT_STOPPED, ConfigError, InputError, RunError, Stopped, exit_code, explain
from dnc_dist.base.files import write_text
from dnc_dist.base.foreign import environment_int
from dnc_dist.base.output import end_quietly, unheard

# Set by the launcher for each worker: where its error goes, and whom to follow.
ERROR_FILE = "DNC_ERROR_FILE"
LAUNCHER_PID = "DNC_LAUNCHER_PID"
# Seconds that a worker has to save its state once it was asked to stop.
STOP_TIMEOUT_SECONDS = 300.0
# Set once another thread than the main one has said why this process ends.
_ending = threading.Event()
# Set once a library hangs, whose hooks the interpreter's shutdown would run.
_no_shutdown = threading.Event()


def is_worker() -> bool:
    """Whether torchrun, srun or a launch of our own started this process as one of several; a batch script or a shell of SLURM did not."""
    return "RANK" in os.environ or environment_int("SLURM_STEP_NUM_TASKS", 1) > 1


def run_worker(work: Callable[[], None]) -> int:
    """Run the work of one rank and return its exit code.

    An error goes to the launcher's file for this rank, or to stderr if there is no launcher. Of errors that every rank
    finds alike (in the configuration, or a RunError), only rank 0 speaks. A failed rank of several ends at once, without the interpreter's
    shutdown, which may wait for ever for peers that are stuck in a collective.
    """
    # A training outlives whoever reads its output: a terminal that is closed, `| head`.
    with unheard(results=True):
        code = _run(work)
        if _no_shutdown.is_set():
            _end_at_once(code)
        return code


def _run(work: Callable[[], None]) -> int:
    faulthandler.enable(2)
    rank, world_size = 0, 1
    try:
        rank = environment_int("RANK", environment_int("SLURM_PROCID", 0))
        world_size = environment_int("WORLD_SIZE", environment_int("SLURM_NTASKS", 1, least=1), least=1)
        if launcher := environment_int(LAUNCHER_PID, 0):
            threading.Thread(target=_follow, args=(launcher, STOP_TIMEOUT_SECONDS), daemon=True).start()
        work()
        return 0
    except Stopped as error:
        if rank == 0:
            print(f"stopped: {error}" if str(error) else "stopped", file=sys.stderr)
        return EXIT_STOPPED
    except Exception as error:
        if _ending.is_set():
            os._exit(EXIT_FAILED)
        explained = explain(error)
        code = exit_code(explained)
        if isinstance(explained, InputError | RunError):
            end_quietly()
        if not _recorded(explained, code, rank if explained is not error else None):
            if not isinstance(explained, InputError | RunError):
                traceback.print_exc()
            elif rank == 0:
                print(f"error: {explained}", file=sys.stderr)
            elif explained is not error or not isinstance(error, ConfigError | RunError):
                print(f"error on rank {rank}: {explained}", file=sys.stderr)
        if world_size > 1:
            _end_at_once(code)
        return code


def _end_at_once(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def skip_shutdown() -> None:
    """Let this worker end with its work, without the interpreter's shutdown: a library hangs, and so would its part of that."""
    _no_shutdown.set()


def end_process(message: str, speak: bool, after_seconds: float) -> NoReturn:
    """End this process with a RunError from a thread beside the main one, which may be stuck for ever.

    Args:
        message: what the launcher is told.
        speak: whether this rank is the one that says it on stderr where there is no launcher.
        after_seconds: how long the process stays for others; what its main thread fails with meanwhile is a consequence.
    """
    _ending.set()
    if not _recorded(RunError(message), EXIT_FAILED) and speak:
        with suppress(OSError):
            os.write(2, f"error: {message}\n".encode(errors="backslashreplace"))
    time.sleep(after_seconds)
    os._exit(EXIT_FAILED)


def _recorded(error: Exception, code: int, rank: int | None = None) -> bool:
    """Write the error for the launcher, and the rank that raised it; False if there is no launcher, or if it cannot be written."""
    path = os.environ.get(ERROR_FILE)
    if not path:
        return False
    record = {
        "time": time.time(),
        "exit_code": code,
        "type": type(error).__name__,
        "message": f"rank {rank}: {error}" if rank is not None and code == EXIT_FAILED else str(error),
        "traceback": "" if isinstance(error, RunError) else traceback.format_exc(),
    }
    try:
        write_text(Path(path), json.dumps(record, ensure_ascii=False))
    except OSError:
        return False
    return True


def _follow(launcher: int, stop_timeout: float) -> None:
    """Once the launcher is gone, ask this process to save and stop; after the timeout, end it and its loader processes."""
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(stop_timeout)
    os.killpg(0, signal.SIGKILL) if os.getpgrp() == os.getpid() else os.kill(os.getpid(), signal.SIGKILL)
