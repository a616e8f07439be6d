"""A request to stop: SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and SIGHUP set a flag; all ranks agree on the step at which they act on it."""

from __future__ import annotations

import signal
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
