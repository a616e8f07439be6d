"""The meeting place of the machines of a launch: a small server in the launcher of the machine that --rdzv names.

Whoever comes must first prove that it knows the launch's secret (channel.py); until then it is one of a few strangers, who have a
few seconds, are read some bytes, and are told nothing. Before the start the host says who is here, or that all is over;
afterwards an alarm of one machine goes to all others, and once every machine has sent its report or is gone, all get the verdict.
Messages go to and fro every two seconds: a machine that is silent for too long is gone, too.
"""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from asyncio import IncompleteReadError, StreamReader, StreamWriter
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dnc_dist.base.errors import InputError
from dnc_dist.processes.launch.channel import (
    ANSWER_BYTES,
    HEADER,
    MAGIC,
    Card,
    Channel,
    Forged,
    FromHost,
    FromMachine,
    Roster,
    admit,
    nonce,
)
from dnc_dist.processes.launch.console import say
from dnc_dist.processes.launch.network import plain
from dnc_dist.processes.launch.peers import Alarm
from dnc_dist.processes.launch.secret import Secret
from dnc_dist.processes.launch.verdict import LaunchReport
from dnc_dist.processes.rendezvous import listen, open_store

if TYPE_CHECKING:
    from torch.distributed import TCPStore

BEAT_SECONDS = 2.0
SILENCE_SECONDS = 30.0
# What workers have to save whose launcher is gone: they are asked by themselves, but nobody can see whether they do.
ORPHAN_SECONDS = 60.0
_MOST_STRANGERS = 64
_STRANGER_SECONDS = 5.0


def why_lost(error: Exception) -> tuple[str, bool]:
    """Why a connection has ended, in words, and whether the workers at its other end stop by themselves: of silence nobody knows."""
    if isinstance(error, Forged):
        return "what came from there was not sent by it; somebody is in the network between", True
    if isinstance(error, InputError):
        return "it sent something else than a launcher of this version does", True
    if isinstance(error, ConnectionError | EOFError):
        return "its launcher was killed, or has ended", True
    return f"nothing was heard of it for {SILENCE_SECONDS:.0f} s; it is down, or the network between", False


@dataclass(eq=False)
class _Machine:
    """A machine that came: what it starts, its end of the connection, and how its workers ended or why nobody knows."""

    card: Card
    name: str
    address: str
    channel: Channel
    writer: StreamWriter
    report: LaunchReport | None = None
    lost: str = ""

    def send(self, message: FromHost) -> None:
        self.writer.write(self.channel.seal(message))


class Host:
    """Gathers ``nnodes`` machines that start the same, and passes on what each says.

    Args:
        listener: the socket of --rdzv.
        secret: where that of this launch is, for all machines.
        key: the secret itself.
        card: that of this machine.
        endpoint: --rdzv, for messages.
        nnodes: machines of a launch.
        wait: seconds until all must be here.
    """

    def __init__(self, listener: socket.socket, secret: Secret, key: bytes, card: Card, endpoint: str, nnodes: int, wait: float) -> None:
        self._secret, self._key, self._card, self._endpoint, self._nnodes, self._wait = secret, key, card, endpoint, nnodes, wait
        self._own_address = ""
        self._strangers: dict[StreamWriter, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._refused = False
        self._here: list[_Machine] = []
        self._roster: list[_Machine] = []
        self._store: TCPStore | None = None
        self._over = False
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(listener),), daemon=True)
        self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Wait until everybody has heard how it ended."""
        self._thread.join(timeout)

    async def _serve(self, listener: socket.socket) -> None:
        # The backlog is also how many connections are taken at once, before the first of them is looked at.
        server = await asyncio.start_server(self._begin, sock=listener, limit=1 << 10, backlog=_MOST_STRANGERS)
        deadline, beat = time.monotonic() + self._wait, 0.0
        while self._here or not self._over:
            now = time.monotonic()
            if not self._roster and not self._over and now > deadline:
                self._end(1, f"{self._present()} at {self._endpoint} after {self._wait:.0f} s; start the same command on the others, too")
            if now > beat:
                beat = now + BEAT_SECONDS
                self._tell_all(FromHost())
            await asyncio.sleep(0.05)
        # As long as the port is ours, nobody else has written a secret for it.
        self._secret.remove()
        server.close()

    def _present(self) -> str:
        verb = "is" if len(self._here) == 1 else "are"
        return f"{len(self._here)} of {self._nnodes} machines {verb} here ({', '.join(machine.name for machine in self._here)})"

    def _tell_all(self, message: FromHost) -> None:
        for machine in self._here:
            machine.send(message)

    def _end(self, code: int, message: str) -> None:
        self._over = True
        self._tell_all(FromHost(over=(code, message)))

    def _begin(self, reader: StreamReader, writer: StreamWriter) -> None:
        # A task of our own: asyncio's complains of each that the end of the launch interrupts.
        task = asyncio.create_task(self._meet(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _meet(self, reader: StreamReader, writer: StreamWriter) -> None:
        """One connection from its beginning to its end."""
        peer = writer.get_extra_info("peername")
        try:
            # None: it has left already.
            channel = None if peer is None else await self._admit(reader, writer, plain(peer[0]))
            if channel is not None:
                await self._listen(reader, writer, channel, plain(peer[0]))
        finally:
            writer.close()

    async def _admit(self, reader: StreamReader, writer: StreamWriter, address: str) -> Channel | None:
        """The channel to a stranger that knows the secret."""
        if len(self._strangers) == _MOST_STRANGERS:
            # One of those has to go who are most: who comes from elsewhere stays.
            (most, _), *_ = Counter(self._strangers.values()).most_common(1)
            victim = random.choice([other for other, where in self._strangers.items() if where == most])
            del self._strangers[victim]
            victim.transport.abort()
        self._strangers[writer] = address
        try:
            number = nonce()
            writer.write(MAGIC + number)
            proof, channel = admit(self._key, number, await asyncio.wait_for(reader.readexactly(ANSWER_BYTES), _STRANGER_SECONDS))
            writer.write(proof)
            return channel
        except (OSError, IncompleteReadError):
            return None
        except Forged:
            if not self._refused:
                say(
                    f"refused {address}, which does not know the secret of this launch ({self._secret.where}); more of that is not reported"
                )
            self._refused = True
            return None
        finally:
            self._strangers.pop(writer, None)

    async def _listen(self, reader: StreamReader, writer: StreamWriter, channel: Channel, address: str) -> None:
        """Act on what a machine says until it leaves."""
        machine = None
        try:
            while True:
                message = await asyncio.wait_for(_receive(reader, channel), SILENCE_SECONDS)
                if machine is None and message.card is not None:
                    own = message.card.id == self._card.id
                    name = f"{message.card.host} ({self._endpoint.rpartition(':')[0] if own else address})"
                    machine = _Machine(message.card, name, address, channel, writer)
                    if not own:
                        # The address under which others reach this machine.
                        self._own_address = plain(writer.get_extra_info("sockname")[0])
                    self._arrive(machine)
                elif machine is not None and message.alarm is not None:
                    self._warn(machine, message.alarm)
                elif machine is not None and message.report is not None:
                    self._note(machine, message.report)
        except (OSError, EOFError, Forged, InputError) as error:
            if machine in self._here:
                self._leave(machine, *why_lost(error))

    def _arrive(self, machine: _Machine) -> None:
        if self._roster or self._over:
            machine.send(FromHost(busy=[other.name for other in self._roster]))
            return
        self._here.append(machine)
        if differences := self._differences(machine):
            self._end(2, f"the machines do not start the same: {differences}; start the same command on all of them")
        elif len(self._here) == self._nnodes and any(other.card.id == self._card.id for other in self._here):
            self._start()
        else:
            self._tell_all(FromHost(waiting=self._present()))

    def _differences(self, machine: _Machine) -> str:
        """What the machine starts otherwise than this one, in words."""
        ours, theirs = self._card.terms, machine.card.terms
        keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        return ", ".join(f"{key} is {ours.get(key)} on {self._card.host} and {theirs.get(key)} on {machine.name}" for key in keys)

    def _start(self) -> None:
        try:
            self._store = open_store(listen(self._own_address, 0), self._own_address)
        except OSError as error:
            self._end(1, f"{self._card.host} cannot open the store of the workers on {self._own_address} ({error.strerror})")
            return
        # The machine of --rdzv has rank 0; the others stand in an order that a restart finds again.
        self._roster = sorted(self._here, key=lambda one: (one.card.id != self._card.id, one.card.host, one.address))
        names = [machine.name for machine in self._roster]
        for number, machine in enumerate(self._roster):
            # The first one cannot see this by itself: it may be connected through its loopback.
            address = self._own_address if number == 0 else ""
            machine.send(FromHost(roster=Roster(names, number, address, self._own_address, self._store.port)))

    def _warn(self, source: _Machine | None, alarm: Alarm) -> None:
        for machine in self._here:
            if machine is not source:
                machine.send(FromHost(alarm=alarm))

    def _note(self, machine: _Machine, report: LaunchReport) -> None:
        # Ages are turned into times of one clock, so that the earliest error of several machines is known.
        machine.report = report.later(time.time())
        self._conclude()

    def _leave(self, machine: _Machine, why: str, orphans: bool) -> None:
        self._here.remove(machine)
        if not self._roster:
            self._tell_all(FromHost(waiting=self._present()))
        elif machine.report is None:
            machine.lost = why
            self._warn(None, Alarm(f"{machine.name}: {why}", orphans, ORPHAN_SECONDS if orphans else 0.0))
            self._conclude()

    def _conclude(self) -> None:
        """Once nothing more is to come, tell everybody who is left how all machines ended."""
        if all(machine.report or machine.lost for machine in self._roster) and not self._over:
            self._over = True
            whole = LaunchReport(lost={machine.name: machine.lost for machine in self._roster if machine.lost})
            for machine in self._roster:
                whole |= machine.report or LaunchReport()
            self._tell_all(FromHost(verdict=whole))


async def _receive(reader: StreamReader, channel: Channel) -> FromMachine:
    header = await reader.readexactly(HEADER.size)
    return channel.open(header, await reader.readexactly(channel.size(header)), FromMachine)
