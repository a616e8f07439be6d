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
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NoReturn, TextIO

from dnc_dist.config import ConfigError
from dnc_dist.errors import EXIT_FAILED, EXIT_STOPPED, InputError, RunError, Stopped, exit_code
from dnc_dist.foreign import environment_int

# Set by the launcher for each worker: where its error goes, and whom to follow.
ERROR_FILE = "DNC_ERROR_FILE"
LAUNCHER_PID = "DNC_LAUNCHER_PID"
# Seconds that a worker has to save its state once it was asked to stop.
STOP_TIMEOUT_SECONDS = 300.0
# Set once another thread than the main one has said why this process ends.
_ending = threading.Event()


class _Output:
    """A stream that writes to nowhere once nobody reads it any more; all that matters stands in the run directory, too."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, and keep nothing back: only so is it known whether somebody reads."""
        try:
            written = self._stream.write(text)
            self._stream.flush()
            return written
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            return len(text)


def run_worker(work: Callable[[], None]) -> int:
    """Run the work of one rank and return its exit code.

    An error goes to the launcher's file for this rank, or to stderr if there is no launcher. Of errors that every rank
    finds alike (in the configuration, or a RunError), only rank 0 speaks. A failed rank of several ends at once, without the interpreter's
    shutdown, which may wait for ever for peers that are stuck in a collective.
    """
    # A training outlives whoever reads its output, as in `| head`.
    with redirect_stdout(_Output(sys.stdout)), redirect_stderr(_Output(sys.stderr)):
        return _run(work)


def _run(work: Callable[[], None]) -> int:
    faulthandler.enable(2)
    rank, world = environment_int("RANK", environment_int("SLURM_PROCID", 0)), environment_int("WORLD_SIZE", 1, least=1)
    if launcher := environment_int(LAUNCHER_PID, 0):
        threading.Thread(target=_follow, args=(launcher, STOP_TIMEOUT_SECONDS), daemon=True).start()
    try:
        work()
        return 0
    except Stopped as error:
        if rank == 0:
            print(f"stopped: {error}" if str(error) else "stopped", file=sys.stderr)
        return EXIT_STOPPED
    except Exception as error:
        if _ending.is_set():
            os._exit(EXIT_FAILED)
        code = exit_code(error)
        if path := os.environ.get(ERROR_FILE):
            _record(path, error, code)
        elif not isinstance(error, InputError | RunError):
            traceback.print_exc()
        elif rank == 0:
            print(f"error: {error}", file=sys.stderr)
        elif not isinstance(error, ConfigError | RunError):
            print(f"error on rank {rank}: {error}", file=sys.stderr)
        if world > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code


def end_process(message: str, speak: bool, after_seconds: float) -> NoReturn:
    """End this process with a RunError from a thread beside the main one, which may be stuck for ever.

    Args:
        message: what the launcher is told.
        speak: whether this rank is the one that says it on stderr where there is no launcher.
        after_seconds: how long the process stays for others; what its main thread fails with meanwhile is a consequence.
    """
    _ending.set()
    if path := os.environ.get(ERROR_FILE):
        _record(path, RunError(message), EXIT_FAILED)
    elif speak:
        os.write(2, f"error: {message}\n".encode())
    time.sleep(after_seconds)
    os._exit(EXIT_FAILED)


def _record(path: str, error: Exception, code: int) -> None:
    """Write the error for the launcher; by rename, so that it never reads half a file."""
    record = {
        "time": time.time(),
        "exit_code": code,
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "" if isinstance(error, RunError) else traceback.format_exc(),
    }
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump(record, file)
    os.replace(f"{path}.part", path)


def _follow(launcher: int, stop_timeout: float) -> None:
    """Once the launcher is gone, ask this process to save and stop; after the timeout, end it and its loader processes."""
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(stop_timeout)
    os.killpg(0, signal.SIGKILL) if os.getpgrp() == os.getpid() else os.kill(os.getpid(), signal.SIGKILL)
