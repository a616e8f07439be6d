"""Somebody on the port of --rdzv who does not know the secret of the launch: all that can be done without it, again and again.

As a program: ``python -m tests.strangers HOST:PORT RECORDED``, until there is a file ``over``; prints connections and bytes told.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dnc_dist.processes.launch import channel

# So many connections stay open; more of them would be too many for this process.
_MOST_OPEN = 300


def connected(endpoint: str) -> socket.socket:
    """A connection to a host that is about to listen."""
    address, _, port = endpoint.rpartition(":")
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection((address, int(port)), timeout=10)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def disturb(endpoint: str, recorded: bytes, over: Callable[[], bool]) -> tuple[int, int]:
    """Garbage, what a machine once sent, long, deep and slow lines, connections that stay.

    Returns:
        Connections made, and bytes that the host told beyond its greeting.
    """
    deeds = [
        b"",
        b"GET / HTTP/1.1\r\n\r\n" * 50,
        b'{"card": {"id": "x", "host": "y", "terms": 5}}\n' * 4,
        b"[" * 100_000,
        os.urandom(channel.ANSWER_BYTES),
        b"A" * (1 << 20),
        recorded,
        recorded[: channel.ANSWER_BYTES],
    ]
    made = told = 0
    address, _, port = endpoint.rpartition(":")
    staying: deque[socket.socket] = deque()
    for number in itertools.count():
        if over():
            break
        with suppress(OSError):
            one = socket.create_connection((address, int(port)), timeout=1)
            made += 1
            staying.append(one)
            one.settimeout(0.2)
            one.sendall(deeds[number % len(deeds)])
            if number % 64 < 8:
                received = 0
                while part := one.recv(4096):
                    received += len(part)
                told += max(0, received - len(channel.MAGIC) - channel.NONCE_BYTES)
        if len(staying) > _MOST_OPEN:
            staying.popleft().close()
        for slow in itertools.islice(staying, 8):
            with suppress(OSError):
                slow.send(b"x")
        if not staying:
            time.sleep(0.01)
    for one in staying:
        one.close()
    return made, told


def main() -> None:
    """Entry point."""
    endpoint, recorded = sys.argv[1:]
    print(json.dumps(disturb(endpoint, Path(recorded).read_bytes(), Path("over").exists)))


if __name__ == "__main__":
    main()
