"""A request to stop: SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and SIGHUP set a flag; all ranks agree on the step at which they act on it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class StopRequest:
    """Whether this process was asked to stop. Being signalled twice changes nothing, but a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Take over the signals of this process; a SIGHUP that is ignored stays so, as ``nohup`` wants it."""
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def signals_held(*numbers: signal.Signals) -> Iterator[None]:
    """Start processes that leave these signals to this one. What comes for it in between comes at the end.

    The processes inherit that the signals are held, so that none ends them, or prints where they were, in the seconds of their imports.
    """
    resource_tracker.ensure_running()  # Python starts this process on the way, and lets signals through when it has
    came = set[int]()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    # Another thread of this process may take a signal, and the main thread would be interrupted with a process half started.
    in_main = threading.current_thread() is threading.main_thread()  # no other thread has, or may set, handlers
    handlers = [(number, signal.signal(number, lambda number, frame: came.add(number))) for number in numbers if in_main]
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers:
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)
