"""How a machine finds the others of a launch through the host that --rdzv names, and speaks with them."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from torch.distributed import TCPStore

from dnc_dist.errors import EXIT_INPUT, InputError
from dnc_dist.launch.console import say
from dnc_dist.launch.host import GONE, ORPHAN_SECONDS, PROTOCOL, SILENCE_SECONDS, Host, silent
from dnc_dist.launch.network import is_here, listen, parse_endpoint, plain
from dnc_dist.launch.peers import Alarm, open_store
from dnc_dist.launch.verdict import Report

_HELLO_SECONDS = 10.0


class MeetingError(Exception):
    """The machines did not meet; the message says who came, and where."""


class Meeting:
    """This machine among the others, from the roster on; its own thread listens and answers the host's beats.

    Args:
        connection: to the host, at which the roster has just arrived.
        lines: what comes from there.
        roster: the host's message.
        endpoint: host and port of --rdzv.
        host: the server, if it runs here.
        store: of the workers, if it is here.
    """

    def __init__(
        self,
        connection: socket.socket,
        lines: Iterator[bytes],
        roster: Mapping[str, Any],
        endpoint: tuple[str, int],
        host: Host | None,
        store: TCPStore | None,
    ) -> None:
        self.machines: list[str] = roster["roster"]
        self.number: int = roster["number"]
        self.address: str = roster["address"] or plain(connection.getsockname()[0])
        self.store = (endpoint[0], int(roster["store_port"]))
        self._connection, self._lines, self._host, self._store = connection, lines, host, store
        self._alarms: queue.SimpleQueue[Alarm] = queue.SimpleQueue()
        self._report = Report()
        self._verdict: Report | None = None
        self._lost: dict[str, str] = {}
        threading.Thread(target=self._read, daemon=True).start()

    def raise_alarm(self, alarm: Alarm) -> None:
        """Tell the other machines."""
        _send(self._connection, alarm=asdict(alarm))

    def alarms(self) -> Iterator[Alarm]:
        """What other machines have told since the last call, or that they cannot be heard any more."""
        with suppress(queue.Empty):
            while True:
                yield self._alarms.get_nowait()

    def tell(self, report: Report) -> None:
        """Say how the workers of this machine ended; times as ages, since the clocks of machines differ."""
        self._report = report
        message = asdict(report)
        message["errors"] = {rank: {**error, "age": time.time() - error["time"]} for rank, error in report.errors.items()}
        _send(self._connection, report=message)

    def verdict(self) -> Report | None:
        """How all workers ended, or those that can still be known about."""
        if self._verdict is None and self._lost:
            return self._report | Report(lost=self._lost)
        return self._verdict

    def close(self) -> None:
        """Leave; the host waits for the others."""
        _close(self._connection)
        if self._host is not None:
            self._host.close()

    def _read(self) -> None:
        host, why, stop = self.machines[0], GONE, True
        try:
            for line in self._lines:
                message = json.loads(line)
                if "beat" in message:
                    _send(self._connection, beat=True)
                elif "alarm" in message:
                    self._alarms.put(Alarm(**message["alarm"]))
                elif "verdict" in message:
                    self._verdict = _joined(message["verdict"])
                    return
        except OSError as error:
            # As in the host: an end is not silence.
            if not isinstance(error, ConnectionError):
                why, stop = silent(), False
        # The alarm first: whoever sees that the host is lost must not miss why.
        self._alarms.put(Alarm(f"{host}: {why}", stop, ORPHAN_SECONDS if stop else 0.0))
        self._lost = {host: why}


def _joined(message: Mapping[str, Any]) -> Report:
    """The reports of all machines as one; JSON has turned the ranks into text."""
    whole = Report(lost=message["lost"])
    for part in message["reports"]:
        codes, errors, tails = ({int(rank): value for rank, value in part[name].items()} for name in ("codes", "errors", "tails"))
        whole |= Report(codes, errors, tails)
    return whole


def _send(connection: socket.socket, **message: Any) -> None:
    # Whoever reads from the connection finds out, and says, that it is broken.
    with suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _close(connection: socket.socket) -> None:
    # Not only `close`, which does nothing as long as somebody reads from it.
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


class _Retry(Exception):
    """The host cannot be joined now, but perhaps soon; the message says why."""


def meet(endpoint: str, nnodes: int, terms: Mapping[str, Any], wait: float) -> Meeting:
    """Find the other machines and wait until all have come.

    Args:
        endpoint: HOST:PORT; the machine that HOST belongs to opens the port, the others connect to it.
        nnodes: how many there are.
        terms: what must be the same on all of them.
        wait: seconds until the last one must have come.

    Raises:
        InputError: the address cannot be used, or machines start different things.
        MeetingError: they did not all come in time.
    """
    host_name, port = parse_endpoint(endpoint)
    card = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "terms": dict(terms)}
    here = is_here(host_name)
    host = store = None
    deadline = time.monotonic() + wait
    said = ""
    while True:
        if here and host is None:
            # If the port is taken, then by the launch before this one, which is about to end, or by another launcher on this machine.
            with suppress(OSError):
                listener = listen(port)
                store = open_store(host_name)
                host = Host(listener, card, endpoint, nnodes, store.port, wait)
        try:
            return _join((host_name, port), card, host, store)
        except _Retry as error:
            why = str(error)
        except OSError as error:
            why = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise MeetingError(f"no start at {endpoint} (--rdzv) within {wait:.0f} s: {why}")
        if why != said:
            say(f"waiting at most {wait:.0f} s for {endpoint}: {why}")
            said = why
        time.sleep(0.5)


def _join(endpoint: tuple[str, int], card: Mapping[str, Any], host: Host | None, store: TCPStore | None) -> Meeting:
    """Connect to the host and wait for the roster; for how long, the host says.

    Raises:
        _Retry, OSError: it does not answer, or has no place.
        InputError, MeetingError: as ``meet``.
    """
    connection = socket.create_connection(endpoint, timeout=_HELLO_SECONDS)
    lines = iter(connection.makefile("rb"))
    try:
        _read_hello(lines, f"--rdzv {endpoint[0]}:{endpoint[1]}")
        connection.settimeout(SILENCE_SECONDS)
        _send(connection, card=dict(card))
        for line in lines:
            message = json.loads(line)
            if "roster" in message:
                return Meeting(connection, lines, message, endpoint, host, store)
            if "busy" in message:
                raise _Retry(f"a run of {', '.join(message['busy']) or 'others'} has not ended there")
            if "over" in message:
                raise (InputError if message["over"]["code"] == EXIT_INPUT else MeetingError)(message["over"]["message"])
            if "waiting" in message:
                say(f"{message['waiting']}; waiting for the others")
            _send(connection, beat=True)
        raise _Retry("the launcher there has ended")
    except BaseException as error:
        _close(connection)
        if host is not None and isinstance(error, (InputError, MeetingError)):
            host.close()
        raise


def _read_hello(lines: Iterator[bytes], what: str) -> None:
    try:
        line = next(lines, b"")
    except TimeoutError:
        line = b"silence"
    if not line:
        raise _Retry("the connection is closed at once")
    try:
        hello = json.loads(line)["hello"]
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{what}: the port is used by another program; choose a free one") from None
    if hello != PROTOCOL:
        raise InputError(f"{what}: the launcher there is of another version of dnc-dist ({hello} instead of {PROTOCOL})")
