"""What the machines of a launch and their host say to each other, and how each knows that it is the other one that speaks.

Both ends first prove with HMAC-SHA256 that they know the launch's secret, over fresh random numbers of both, so that a recorded
proof is worth nothing. Nothing of the launch is sent before, and nothing but the proof is read. Every message after that carries a
code by a key of this connection and direction over its number, so that none can be forged, changed, repeated or left out. Messages
are JSON, not encrypted: who listens on the network can read them.
"""

from __future__ import annotations

import hmac
import json
import secrets
import struct
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from dnc_dist.base.foreign import parse_json
from dnc_dist.processes.launch.peers import Alarm
from dnc_dist.processes.launch.verdict import LaunchReport

T = TypeVar("T")
MAGIC = b"dnc-dist launch 2\n"
NONCE_BYTES = 32
CODE_BYTES = 32
ANSWER_BYTES = NONCE_BYTES + CODE_BYTES
HEADER = struct.Struct(f">I{CODE_BYTES}s")
# Of one message; the reports of a thousand ranks fit.
_MOST_BYTES = 1 << 26


class Forged(Exception):
    """What came was not sent by somebody who knows the secret."""


@dataclass(frozen=True)
class Card:
    """A machine that comes: a name of this very launcher, its host name, and what it starts, by name."""

    id: str
    host: str
    terms: dict[str, Any]


@dataclass(frozen=True)
class FromMachine:
    """A message to the host: one of these, or none, which says that the machine is there."""

    card: Card | None = None
    alarm: Alarm | None = None
    report: LaunchReport | None = None


@dataclass(frozen=True)
class Roster:
    """The start: the names of all machines, the number and the address of this one, and where the workers' store is."""

    machines: list[str]
    number: int
    address: str
    store_address: str
    store_port: int


@dataclass(frozen=True)
class FromHost:
    """A message to a machine: one of these, or none, which says that the host is there.

    ``waiting`` tells who is here, ``busy`` who runs so that there is no place, ``over`` exit code and reason why there is no start.
    """

    waiting: str = ""
    busy: list[str] | None = None
    over: tuple[int, str] | None = None
    roster: Roster | None = None
    alarm: Alarm | None = None
    verdict: LaunchReport | None = None


@dataclass
class Channel:
    """One end of a connection whose two ends have proved themselves."""

    sending: bytes
    receiving: bytes
    sent: int = field(default=0, init=False)
    received: int = field(default=0, init=False)

    def seal(self, message: FromMachine | FromHost) -> bytes:
        """A message as bytes, which must be sent in this order."""
        # Names that are no Unicode, as a folder in Latin-1, must not make a message that nobody can read.
        payload = json.dumps(asdict(message), ensure_ascii=False).encode(errors="replace")
        self.sent += 1
        return HEADER.pack(len(payload), _code(self.sending, self.sent, payload)) + payload

    def size(self, header: bytes) -> int:
        """Bytes that come after a header.

        Raises:
            Forged: no message is so long.
        """
        size: int = HEADER.unpack(header)[0]
        if size > _MOST_BYTES:
            raise Forged
        return size

    def open(self, header: bytes, payload: bytes, shape: type[T]) -> T:
        """The message in ``payload``.

        Raises:
            Forged: it is not the next one of the other end.
            InputError: the other end sent something else than a ``shape``.
        """
        self.received += 1
        if not hmac.compare_digest(HEADER.unpack(header)[1], _code(self.receiving, self.received, payload)):
            raise Forged
        return parse_json(payload, shape, "a message of the launch")


def nonce() -> bytes:
    """A random number that was never used before."""
    return secrets.token_bytes(NONCE_BYTES)


def answer(secret: bytes, host_nonce: bytes, own_nonce: bytes) -> bytes:
    """What a machine answers to the host's number: its own, and its proof."""
    return own_nonce + _derive(secret, b"machine proves", host_nonce + own_nonce)


def admit(secret: bytes, host_nonce: bytes, answered: bytes) -> tuple[bytes, Channel]:
    """The host's own proof for a machine that answered, and the channel to it.

    Raises:
        Forged: the machine does not know the secret.
    """
    nonces = host_nonce + answered[:NONCE_BYTES]
    if not hmac.compare_digest(answered[NONCE_BYTES:], _derive(secret, b"machine proves", nonces)):
        raise Forged
    to_machine, to_host = (_derive(secret, label, nonces) for label in (b"host speaks", b"machine speaks"))
    return _derive(secret, b"host proves", nonces), Channel(to_machine, to_host)


def trust(secret: bytes, host_nonce: bytes, own_nonce: bytes, proof: bytes) -> Channel:
    """The channel to a host that sent this proof.

    Raises:
        Forged: the host does not know the secret.
    """
    nonces = host_nonce + own_nonce
    if not hmac.compare_digest(proof, _derive(secret, b"host proves", nonces)):
        raise Forged
    to_machine, to_host = (_derive(secret, label, nonces) for label in (b"host speaks", b"machine speaks"))
    return Channel(to_host, to_machine)


def _derive(secret: bytes, label: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret, label + nonces, "sha256")


def _code(key: bytes, number: int, payload: bytes) -> bytes:
    return hmac.digest(key, number.to_bytes(8, "big") + payload, "sha256")
