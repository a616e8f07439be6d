"""How a rank finds the others: who it is, from torchrun's or SLURM's variables, and the store of torch at the address that they name."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import environment_int, shorten

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

LOOPBACK = "127.0.0.1"
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# So long ranks wait for each other at most; they are started together, but a file system may be slow to give them Python.
_MEET_SECONDS = 600.0
_SCONTROL_SECONDS = 30.0


class Start(NamedTuple):
    """Which rank this is of how many, where they find their store, and whether their launcher holds it (else rank 0 does)."""

    rank: int
    world: int
    address: str
    port: int
    launcher_holds_store: bool

    @property
    def place(self) -> str:
        """The address, as messages call it."""
        return f"MASTER_ADDR={self.address} MASTER_PORT={self.port}"


def read_environment() -> Start:
    """Who this rank is by torchrun's variables, else by SLURM's, else the only one. Sets torchrun's, which libraries read.

    Raises:
        InputError: variables are missing, or hold something else than they should.
    """
    given = [name for name in _TORCHRUN if name in os.environ]
    if "SLURM_PROCID" in os.environ and "RANK" not in os.environ and environment_int("SLURM_NTASKS", 1, least=1) > 1:
        os.environ.update(_slurm_environment())
    elif not {"RANK", "WORLD_SIZE"} & set(given):
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR=LOOPBACK, MASTER_PORT="0")
    elif missing := [name for name in _TORCHRUN if name not in os.environ]:
        raise InputError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}; start with `dnc-dist launch`, torchrun or srun, "
            "or unset all of them"
        )
    world = environment_int("WORLD_SIZE", least=1)
    rank = environment_int("RANK", most=world - 1)
    environment_int("LOCAL_RANK")
    port = environment_int("MASTER_PORT", least=0 if world == 1 else 1, most=65535)
    return Start(rank, world, os.environ["MASTER_ADDR"], port, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


def _slurm_environment() -> dict[str, str]:
    """torchrun's variables from those of a SLURM step with one task per GPU."""
    numbers = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
    found = {name: str(environment_int(slurm)) for name, slurm in numbers.items()}
    found["MASTER_ADDR"] = os.environ.get("MASTER_ADDR") or _first_host()
    found["MASTER_PORT"] = os.environ.get("MASTER_PORT") or str(20000 + environment_int("SLURM_JOB_ID", most=1 << 62) % 20000)
    return found


def _first_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or ""
    cure = "set MASTER_ADDR for all tasks to the host of task 0"
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SCONTROL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        why = error.strerror if isinstance(error, OSError) else f"no answer for {_SCONTROL_SECONDS:.0f} s"
        raise InputError(f"SLURM started this task, but scontrol, which knows its hosts, cannot be run ({why}); {cure}") from error
    hosts = done.stdout.split()
    if done.returncode or not hosts:
        raise InputError(f"scontrol finds no hosts in the node list {shorten(nodes)} ({shorten(done.stderr.strip())}); {cure}")
    return hosts[0]


def is_loopback(host: str) -> bool:
    """Whether a host is by its very name this machine, for nobody else to reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def use_loopback() -> None:
    """Ranks that meet on the loopback are all on this machine: gloo and NCCL shall listen nowhere else, either."""
    name = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.update(GLOO_SOCKET_IFNAME=name, NCCL_SOCKET_IFNAME=f"={name}")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket at the address of this machine that a name leads to, and at no other.

    A name may lead to the loopback here and elsewhere to this machine, as Debian's /etc/hosts has it, or to an address that
    another device translates to one of ours; only then it listens on all addresses.

    Raises:
        OSError: the name has no address, or the port is taken.
    """
    for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
        if ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback and not is_loopback(host):
            continue
        try:
            return socket.create_server(address, family=family, backlog=1024)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise OSError(error.errno, os.strerror(error.errno or 0)) from error
    if is_loopback(host):
        raise OSError(errno.EADDRNOTAVAIL, "the loopback has no address")
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def open_store(listener: socket.socket, host: str, timeout_seconds: float = 1800.0) -> TCPStore:
    """The store of torch, held by this process, at a listening socket that becomes its own.

    Args:
        listener: from ``listen``.
        host: to which name it listens.
        timeout_seconds: of the store's operations.
    """
    from torch.distributed import TCPStore

    port = listener.getsockname()[1]
    # It has no lock of any kind: who can connect to it can read, write and end it. The address is its only protection.
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_seconds),
        master_listen_fd=listener.detach(),
    )


def join(start: Start, timeout_seconds: float) -> Store:
    """Collective. The store of all ranks, once all are there.

    Args:
        start: who this rank is.
        timeout_seconds: of the store's operations afterwards.

    Raises:
        InputError: the address cannot be used, nobody answers there, or not all ranks come, within ten minutes or that timeout.
    """
    deadline = time.monotonic() + min(timeout_seconds, _MEET_SECONDS)
    try:
        socket.getaddrinfo(start.address, start.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{start.place}: this machine finds no address for that name ({why}); set MASTER_ADDR to an IP address") from error
    if start.rank > 0 or start.launcher_holds_store:
        _wait_for_listener(start, deadline)
    found: Future[Store] = Future()
    # The constructor of the store, and its answers, may wait for ever for a port on which somebody listens and says nothing.
    threading.Thread(target=_connect, args=(start, timeout_seconds, deadline, found), daemon=True, name="join").start()
    try:
        return found.result(max(1.0, deadline + 5.0 - time.monotonic()))
    except TimeoutError:
        raise InputError(
            f"rank {start.rank}: {start.place} takes connections but does not answer as torch's store does; another program may have "
            "the port, choose a free one"
        ) from None


def _wait_for_listener(start: Start, deadline: float) -> None:
    while True:
        try:
            socket.create_connection((start.address, start.port), timeout=max(1.0, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                holder = "the launcher" if start.launcher_holds_store else "rank 0"
                raise InputError(
                    f"rank {start.rank} of {start.world} could not reach {holder} at {start.place} ({error.strerror or error}): "
                    "was it started, is that its address, and does a firewall let the port through?"
                ) from error
            time.sleep(0.2)


def _connect(start: Start, timeout_seconds: float, deadline: float, found: Future[Store]) -> None:
    """Make the store and wait in it for the other ranks; for a thread of its own."""
    from torch.distributed import DistError, TCPStore

    try:
        if start.rank > 0 or start.launcher_holds_store:
            store = TCPStore(start.address, start.port, is_master=False, timeout=timedelta(seconds=timeout_seconds))
        else:
            store = open_store(listen(start.address, start.port), start.address, timeout_seconds)
        keys = [f"here/{rank}" for rank in range(start.world)]
        store.set(keys[start.rank], "")
        try:
            store.wait(keys, timedelta(seconds=max(0.1, deadline - time.monotonic())))
        except DistError:
            absent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
            raise InputError(
                f"rank(s) {', '.join(absent)} of {start.world} did not come to {start.place} in time; start all, with the same variables"
            ) from None
        found.set_result(store)
    except InputError as error:
        found.set_exception(error)
    except OSError as error:
        cure = (
            "choose another MASTER_PORT" if error.errno == errno.EADDRINUSE else "set MASTER_ADDR and MASTER_PORT to what rank 0 can open"
        )
        found.set_exception(InputError(f"{start.place} cannot be opened on rank 0 ({error.strerror}); {cure}"))
    except DistError as error:
        found.set_exception(InputError(f"rank {start.rank}: no store of torch at {start.place} ({str(error).splitlines()[0]})"))
    except BaseException as error:
        found.set_exception(error)
