"""Network addresses: whether one belongs to this machine, and through which interface the machines reach each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

from dnc_dist.base.errors import InputError

# How to tell each library which interface to use; without, gloo takes the one of the machine's own host name, often the loopback.
_INTERFACE_VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}


def parse_endpoint(text: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[IPv6]:PORT`` -> host, port.

    Raises:
        InputError: it is neither.
    """
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or (":" in host and not bracketed):
        raise InputError(
            f"--rdzv {text}: expected HOST:PORT, for example 10.0.0.1:29500; an IPv6 address stands in brackets, [fd00::1]:29500"
        )
    return host.strip("[]"), int(port)


def is_here(host: str) -> bool:
    """Whether an address or a name belongs to this machine.

    Raises:
        InputError: the name has no address.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"--rdzv: this machine cannot resolve {host} ({why}); use an IP address") from error
    return any(_binds(family, address) for family, _, _, _, address in found)


def _binds(family: int, address: tuple[Any, ...]) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(address)
        except OSError:
            return False
        return True


def plain(address: str) -> str:
    """An IPv4 address as such, where a socket shows it inside an IPv6 one."""
    return address.removeprefix("::ffff:")


def _interfaces_of(address: str) -> Iterator[str]:
    import psutil  # only several machines need it

    for name, addresses in psutil.net_if_addrs().items():
        if address in (entry.address.partition("%")[0] for entry in addresses):
            yield name


def interface_settings(address: str) -> dict[str, str]:
    """Variables that make gloo and NCCL use the interface with this address of ours; those that the user has set stay.

    Raises:
        InputError: no interface has the address, and the user has not named one.
    """
    missing = [name for name in _INTERFACE_VARIABLES if name not in os.environ]
    interface = next(_interfaces_of(address), None)
    if missing and interface is None:
        raise InputError(
            f"no network interface of this machine has the address {address}, from which it reaches the others; set {' and '.join(missing)}"
        )
    return {name: os.environ.get(name, pattern.format(interface)) for name, pattern in _INTERFACE_VARIABLES.items()}
