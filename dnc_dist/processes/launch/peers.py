"""The machines of a launch as one of them sees them, and what that is for the only one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dnc_dist.processes.launch.verdict import LaunchReport
from dnc_dist.processes.rendezvous import LOOPBACK, listen, open_store

if TYPE_CHECKING:
    from torch.distributed import TCPStore


class MeetingError(Exception):
    """The machines did not meet; the message says who came, and where."""


@dataclass(frozen=True)
class Alarm:
    """Something happened on a machine that the workers of the others must not wait for.

    Attributes:
        text: what; empty if the verdict will say it.
        stop: whether the workers should save and stop, since all others do.
        seconds: after which they are ended.
    """

    text: str
    stop: bool
    seconds: float


class Peers(Protocol):
    """The machines of a launch as one of them sees them.

    Attributes:
        machines: their names.
        number: which one this is.
        address: of this one, on the network to the others.
        store: host and port where workers find the store of torch; it is in the launcher of machine 0.
    """

    machines: list[str]
    number: int
    address: str
    store: tuple[str, int]

    def open_store(self) -> None:
        """Called once the workers are started: the store that they look for answers from now on at the latest."""

    def raise_alarm(self, alarm: Alarm) -> None:
        """Tell the other machines."""

    def alarms(self) -> Iterator[Alarm]:
        """What other machines have told since the last call."""

    def tell(self, report: LaunchReport) -> None:
        """Say how the workers of this machine ended."""

    def verdict(self) -> LaunchReport | None:
        """How all workers ended; None as long as that is not known."""

    def close(self) -> None:
        """Leave."""


class Alone:
    """The only machine of a launch, with ``count`` workers; a single one needs no store."""

    machines = ["this machine"]
    number = 0
    address = LOOPBACK

    def __init__(self, count: int) -> None:
        # Workers may connect from now on, and wait for an answer.
        self._listener = listen(LOOPBACK, 0) if count > 1 else None
        self._store: TCPStore | None = None
        self.store = (LOOPBACK, 0 if self._listener is None else self._listener.getsockname()[1])
        self._report: LaunchReport | None = None

    def open_store(self) -> None:
        """Only now torch is imported, beside the workers that do so, too."""
        if self._listener is not None:
            self._store = open_store(self._listener, LOOPBACK)

    def raise_alarm(self, alarm: Alarm) -> None:
        """Nobody listens."""

    def alarms(self) -> Iterator[Alarm]:
        """Nobody speaks."""
        return iter(())

    def tell(self, report: LaunchReport) -> None:
        """Say how the workers ended."""
        self._report = report

    def verdict(self) -> LaunchReport | None:
        """What was told."""
        return self._report

    def close(self) -> None:
        """Close the port of the store; torch does so once nobody holds the store."""
        self._store = None
        if self._listener is not None:
            self._listener.close()
