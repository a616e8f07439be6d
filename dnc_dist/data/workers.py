"""How loader workers are started: forked from a small server process that has imported what they need and has one thread.

Not forked from the training process: that one has threads of gloo, autograd and the tracker, and in a child that is forked while
one of them is about to come or go, CPython 3.11 can wait for ever for a lock that nobody will release. Nor spawned: every worker
of every pass would import torch anew.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from multiprocessing.util import Finalize

from dnc_dist.processes.signals import STOP_SIGNALS, signals_held


def worker_context(workers: int) -> BaseContext | None:
    """The multiprocessing context of a loader with so many workers; None without any. The first worker starts the server, if
    ``start_server`` has not."""
    if not workers:
        return None
    _end_with_this_process()
    return _context()


def start_server() -> None:
    """Start the server now, long before the first worker; its own imports take seconds."""
    _context()
    with signals_held(*STOP_SIGNALS):
        forkserver.ensure_running()


def _context() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dnc_dist.data.worker_server"])
    return context


@cache
def _end_with_this_process() -> None:
    """Let the exit of this process end the workers that an error has left over: Python would ask them to, and wait, but they leave
    signals to this process."""
    Finalize(None, _end_workers, exitpriority=0)


def _end_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def worker_start() -> Callable[[int], None]:
    """What every worker of this process runs first."""
    return partial(_start, os.getpid())


def _start(trainer: int, worker: int) -> None:
    leave_signals()
    threading.Thread(target=_follow, args=(trainer,), daemon=True).start()


def leave_signals() -> None:
    """Leave signals to the training process: SLURM and terminals send them to every process, and the last batches are still needed."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _follow(trainer: int) -> None:
    """End this worker once the training process is gone; its parent, the server, lives as long as a worker does."""
    while True:
        time.sleep(1)
        try:
            os.kill(trainer, 0)
        except ProcessLookupError:
            os._exit(1)
