"""How a machine finds the others of a launch through the host that --rdzv names, and speaks with them."""

from __future__ import annotations

import errno
import queue
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from dnc_dist.base.errors import EXIT_INPUT, InputError
from dnc_dist.processes.launch.channel import (
    CODE_BYTES,
    HEADER,
    MAGIC,
    NONCE_BYTES,
    Card,
    Channel,
    Forged,
    FromHost,
    FromMachine,
    Roster,
    answer,
    nonce,
    trust,
)
from dnc_dist.processes.launch.console import say
from dnc_dist.processes.launch.host import ORPHAN_SECONDS, SILENCE_SECONDS, Host, why_lost
from dnc_dist.processes.launch.network import is_here, parse_endpoint, plain
from dnc_dist.processes.launch.peers import Alarm, MeetingError
from dnc_dist.processes.launch.secret import NoSecretError, Secret
from dnc_dist.processes.launch.verdict import LaunchReport
from dnc_dist.processes.rendezvous import listen

_HELLO_SECONDS = 10.0


class _Line:
    """A connection to the host whose two ends have proved themselves."""

    def __init__(self, connection: socket.socket, channel: Channel) -> None:
        self.connection, self._channel = connection, channel
        self._sending = threading.Lock()

    def send(self, message: FromMachine) -> None:
        # Whoever reads from the connection finds out, and says, that it is broken.
        with self._sending, suppress(OSError):
            self.connection.sendall(self._channel.seal(message))

    def receive(self) -> FromHost:
        """The next message.

        Raises:
            OSError: the connection has ended, or nothing came for too long.
            Forged: what came is not of the host.
        """
        deadline = time.monotonic() + SILENCE_SECONDS
        header = _receive(self.connection, HEADER.size, deadline)
        return self._channel.open(header, _receive(self.connection, self._channel.size(header), deadline), FromHost)

    def close(self) -> None:
        # Not only `close`, which does nothing as long as somebody reads from it.
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


def _receive(connection: socket.socket, size: int, deadline: float) -> bytes:
    """So many bytes, before that time."""
    data = b""
    while len(data) < size:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("the connection is closed")
        data += part
    return data


class Meeting:
    """This machine among the others, from the roster on; its own thread listens and answers the host's beats.

    Args:
        line: to the host, from which the roster has just arrived.
        roster: the host's message.
        host: the server, if it runs here.
    """

    def __init__(self, line: _Line, roster: Roster, host: Host | None) -> None:
        self.machines, self.number = roster.machines, roster.number
        self.address = roster.address or plain(line.connection.getsockname()[0])
        self.store = (roster.store_address, roster.store_port)
        self._line, self._host = line, host
        self._alarms: queue.SimpleQueue[Alarm] = queue.SimpleQueue()
        self._report = LaunchReport()
        self._verdict: LaunchReport | None = None
        self._lost: dict[str, str] = {}
        threading.Thread(target=self._read, daemon=True).start()

    def open_store(self) -> None:
        """The host has opened it before the start."""

    def raise_alarm(self, alarm: Alarm) -> None:
        """Tell the other machines."""
        self._line.send(FromMachine(alarm=alarm))

    def alarms(self) -> Iterator[Alarm]:
        """What other machines have told since the last call, or that they cannot be heard any more."""
        with suppress(queue.Empty):
            while True:
                yield self._alarms.get_nowait()

    def tell(self, report: LaunchReport) -> None:
        """Say how the workers of this machine ended; times as ages, since the clocks of machines differ."""
        self._report = report
        self._line.send(FromMachine(report=report.later(-time.time())))

    def verdict(self) -> LaunchReport | None:
        """How all workers ended, or those that can still be known about."""
        if self._verdict is None and self._lost:
            return self._report | LaunchReport(lost=self._lost)
        return self._verdict

    def close(self) -> None:
        """Leave; the host waits for the others."""
        self._line.close()
        if self._host is not None:
            self._host.close()

    def _read(self) -> None:
        host = self.machines[0]
        try:
            while True:
                message = self._line.receive()
                if message.alarm is not None:
                    self._alarms.put(message.alarm)
                elif message.verdict is not None:
                    self._verdict = message.verdict
                    return
                else:
                    self._line.send(FromMachine())
        except (OSError, Forged, InputError) as error:
            why, stop = why_lost(error)
        # The alarm first: whoever sees that the host is lost must not miss why.
        self._alarms.put(Alarm(f"{host}: {why}", stop, ORPHAN_SECONDS if stop else 0.0))
        self._lost = {host: why}


class _Retry(Exception):
    """The host cannot be joined now, but perhaps soon; the message says why."""


def meet(endpoint: str, nnodes: int, terms: Mapping[str, Any], wait: float, secret: Secret) -> Meeting:
    """Find the other machines and wait until all have come.

    Args:
        endpoint: HOST:PORT; the machine that HOST belongs to opens the port, the others connect to it.
        nnodes: how many there are.
        terms: what must be the same on all of them.
        wait: seconds until the last one must have come.
        secret: what all of them know and nobody else.

    Raises:
        InputError: the address or the secret cannot be used, or machines start different things.
        MeetingError: they did not all come in time.
    """
    place = parse_endpoint(endpoint)
    card = Card(uuid.uuid4().hex, socket.gethostname(), dict(terms))
    here = is_here(place[0])
    host, key = None, b""
    deadline = time.monotonic() + wait
    said = ""
    while True:
        if here and host is None:
            try:
                listener = listen(*place)
                key = secret.renew()
                host = Host(listener, secret, key, card, endpoint, nnodes, wait)
            except OSError as error:
                # If the port is taken, then by the launch before this one, which is about to end, or by another launcher on this machine.
                if error.errno != errno.EADDRINUSE:
                    raise InputError(f"--rdzv {endpoint}: cannot listen there ({error.strerror}); choose another port") from error
        try:
            return _join(place, card, host, secret, key)
        except (_Retry, NoSecretError) as error:
            why = str(error)
        except OSError as error:
            why = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise MeetingError(f"no start at {endpoint} (--rdzv) within {wait:.0f} s: {why}")
        if why != said:
            say(f"waiting at most {wait:.0f} s for {endpoint}: {why}")
            said = why
        time.sleep(0.5)


def _join(place: tuple[str, int], card: Card, host: Host | None, secret: Secret, key: bytes) -> Meeting:
    """Connect to the host and wait for the roster; for how long, the host says.

    Raises:
        _Retry, NoSecretError, OSError: it does not answer, does not know the secret, or has no place.
        InputError, MeetingError: as ``meet``.
    """
    line = None
    connection = socket.create_connection(place, timeout=_HELLO_SECONDS)
    try:
        line = _greet(connection, place, secret, key)
        line.send(FromMachine(card=card))
        while True:
            message = line.receive()
            if message.roster is not None:
                return Meeting(line, message.roster, host)
            if message.busy is not None:
                raise _Retry(f"a run of {', '.join(message.busy) or 'others'} has not ended there")
            if message.over is not None:
                code, text = message.over
                raise (InputError if code == EXIT_INPUT else MeetingError)(text)
            if message.waiting:
                say(f"{message.waiting}; waiting for the others")
            line.send(FromMachine())
    except BaseException as error:
        (line or connection).close()
        if isinstance(error, Forged):
            raise _Retry("what comes from there is not of this launch") from None
        if host is not None and isinstance(error, (InputError, MeetingError)):
            host.close()
        raise


def _greet(connection: socket.socket, place: tuple[str, int], secret: Secret, key: bytes) -> _Line:
    """Prove to the host that this machine knows the secret, and let it do the same."""
    deadline = time.monotonic() + _HELLO_SECONDS
    if _receive(connection, len(MAGIC), deadline) != MAGIC:
        raise InputError(
            f"--rdzv {place[0]}:{place[1]}: the port is used by another program, or by another version of dnc-dist; choose a free one"
        )
    host_nonce, own_nonce = _receive(connection, NONCE_BYTES, deadline), nonce()
    # Read only now: a host that greets has written its own.
    key = key or secret.read()
    connection.sendall(answer(key, host_nonce, own_nonce))
    try:
        return _Line(connection, trust(key, host_nonce, own_nonce, _receive(connection, CODE_BYTES, deadline)))
    except (ConnectionError, Forged):
        raise _Retry(f"the launcher there does not know the secret of this machine ({secret.where})") from None
