"""The meeting place of the machines of a launch: a small server in the launcher of the machine that --rdzv names.

Everybody who comes gets lines of JSON and sends some. Before the start these are `hello`, `waiting`, `busy`, `over` and
`roster`; afterwards an `alarm` of one machine goes to all others, and once every machine has sent its `report` or is gone,
all get the `verdict`. A `beat` goes to and fro: a machine that is silent for too long is gone, too.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dnc_dist.launch.network import plain

PROTOCOL = "dnc-dist launch 1"
BEAT_SECONDS = 2.0
SILENCE_SECONDS = 30.0
# What workers have to save whose launcher is gone: they are asked by themselves, but nobody can see whether they do.
ORPHAN_SECONDS = 60.0
GONE = "its launcher was killed, or has ended"
_LONGEST_LINE = 1 << 24


def silent() -> str:
    """Why a machine is lost that does not answer."""
    return f"nothing was heard of it for {SILENCE_SECONDS:.0f} s; it is down, or the network between"


@dataclass(eq=False)
class _Machine:
    """A machine that came: what it starts, its end of the connection, and how its workers ended or why nobody knows."""

    card: dict[str, Any]
    name: str
    address: str
    writer: asyncio.StreamWriter
    report: dict[str, Any] | None = None
    lost: str = ""

    def send(self, **message: Any) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")


class Host:
    """Gathers ``nnodes`` machines that start the same, and passes on what each says.

    Args:
        listener: the socket of --rdzv.
        card: that of this machine: `id`, `host`, `terms`.
        endpoint: --rdzv, for messages.
        nnodes: machines of a launch.
        store_port: where workers find the store of torch.
        wait: seconds until all must be here.
    """

    def __init__(self, listener: socket.socket, card: Mapping[str, Any], endpoint: str, nnodes: int, store_port: int, wait: float) -> None:
        self._card, self._endpoint, self._nnodes, self._store_port, self._wait = card, endpoint, nnodes, store_port, wait
        self._own_address = ""
        self._here: list[_Machine] = []
        self._roster: list[_Machine] = []
        self._over = False
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(listener),), daemon=True)
        self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Wait until everybody has heard how it ended."""
        self._thread.join(timeout)

    async def _serve(self, listener: socket.socket) -> None:
        server = await asyncio.start_server(self._meet, sock=listener, limit=_LONGEST_LINE)
        deadline, beat = time.monotonic() + self._wait, 0.0
        while self._here or not self._over:
            now = time.monotonic()
            if not self._roster and not self._over and now > deadline:
                self._end(1, f"{self._present()} at {self._endpoint} after {self._wait:.0f} s; start the same command on the others, too")
            if now > beat:
                beat = now + BEAT_SECONDS
                self._tell_all(beat=True)
            await asyncio.sleep(0.05)
        server.close()

    def _present(self) -> str:
        verb = "is" if len(self._here) == 1 else "are"
        return f"{len(self._here)} of {self._nnodes} machines {verb} here ({', '.join(machine.name for machine in self._here)})"

    def _tell_all(self, **message: Any) -> None:
        for machine in self._here:
            machine.send(**message)

    def _end(self, code: int, message: str) -> None:
        self._over = True
        self._tell_all(over={"code": code, "message": message})

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection from its beginning to its end."""
        machine, why, orphans = None, GONE, True
        try:
            writer.write(json.dumps({"hello": PROTOCOL}).encode() + b"\n")
            while line := await asyncio.wait_for(reader.readline(), SILENCE_SECONDS):
                message = json.loads(line)
                if machine is None:
                    machine = self._arrive(message["card"], writer)
                elif "alarm" in message:
                    self._warn(machine, message["alarm"])
                elif "report" in message:
                    self._note(machine, message["report"])
        except OSError as error:
            # A reset connection is one that has ended; of silence, or a broken network, nobody knows what it means for its workers.
            if not isinstance(error, ConnectionError):
                why, orphans = silent(), False
        except (ValueError, TypeError, KeyError):
            why = "it sent something else than a launcher of this version does"
        finally:
            writer.close()
            if machine is not None:
                self._leave(machine, why, orphans)

    def _arrive(self, card: dict[str, Any], writer: asyncio.StreamWriter) -> _Machine | None:
        own = card["id"] == self._card["id"]
        address = plain(writer.get_extra_info("peername")[0])
        if not own:
            # The address under which others reach this machine.
            self._own_address = plain(writer.get_extra_info("sockname")[0])
        machine = _Machine(card, f"{card['host']} ({self._endpoint.rpartition(':')[0] if own else address})", address, writer)
        if self._roster or self._over:
            machine.send(busy=[other.name for other in self._roster])
            return None
        self._here.append(machine)
        if differences := self._differences(machine):
            self._end(2, f"the machines do not start the same: {differences}; start the same command on all of them")
        elif len(self._here) == self._nnodes and any(other.card["id"] == self._card["id"] for other in self._here):
            self._start()
        else:
            self._tell_all(waiting=self._present())
        return machine

    def _differences(self, machine: _Machine) -> str:
        """What the machine starts otherwise than this one, in words."""
        ours, theirs = self._card["terms"], machine.card["terms"]
        keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        return ", ".join(f"{key} is {ours.get(key)} on {self._card['host']} and {theirs.get(key)} on {machine.name}" for key in keys)

    def _start(self) -> None:
        # The machine of --rdzv has rank 0; the others stand in an order that a restart finds again.
        self._roster = sorted(self._here, key=lambda one: (one.card["id"] != self._card["id"], one.card["host"], one.address))
        names = [machine.name for machine in self._roster]
        for number, machine in enumerate(self._roster):
            # The first one cannot see this by itself: it is connected through its loopback.
            address = self._own_address if number == 0 else ""
            machine.send(roster=names, number=number, address=address, store_port=self._store_port)

    def _warn(self, source: _Machine | None, alarm: dict[str, Any]) -> None:
        for machine in self._here:
            if machine is not source:
                machine.send(alarm=alarm)

    def _note(self, machine: _Machine, report: dict[str, Any]) -> None:
        # Ages are turned into times of one clock, so that the earliest error of several machines is known.
        for error in report["errors"].values():
            error["time"] = time.time() - error["age"]
        machine.report = report
        self._conclude()

    def _leave(self, machine: _Machine, why: str, orphans: bool) -> None:
        self._here.remove(machine)
        if not self._roster:
            self._tell_all(waiting=self._present())
        elif machine.report is None:
            machine.lost = why
            self._warn(None, {"text": f"{machine.name}: {why}", "stop": orphans, "seconds": ORPHAN_SECONDS if orphans else 0.0})
            self._conclude()

    def _conclude(self) -> None:
        """Once nothing more is to come, tell everybody who is left how all machines ended."""
        reports = [machine.report for machine in self._roster if machine.report is not None]
        lost = [machine for machine in self._roster if machine.lost]
        if len(reports) + len(lost) == self._nnodes and not self._over:
            self._over = True
            self._tell_all(verdict={"reports": reports, "lost": {machine.name: machine.lost for machine in lost}})
