"""Hosts of their own on this machine: each has its own network, host name and processes, and a cable to a switch that leads nowhere else.

A host is a set of Linux namespaces that one process holds as PID 1; it waits for the end of a pipe from this one, so that all
hosts and everything on them are gone when the test ends, in whatever way. They share the machine's files. Needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

_SPACES = ("--net", "--uts", "--ipc", "--pid", "--mount")
_PATH = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
# Its own host name is not in /etc/hosts, or leads to the loopback: both are common.
_BOOT = """
set -e
hostname "$1"
if [ -n "$2" ]; then mount --bind "$2" /etc/hosts; fi
ip link set lo up
echo up
exec cat
"""


def missing() -> str:
    """Why there can be no hosts here; empty if there can."""
    if os.geteuid() != 0:
        return "hosts in network namespaces need root"
    if absent := [name for name in ("unshare", "nsenter", "ip") if shutil.which(name, path=_PATH["PATH"]) is None]:
        return f"hosts in network namespaces need {', '.join(absent)}"
    trial = ["unshare", *_SPACES, "--fork", "--kill-child", "--mount-proc", "ip", "link", "add", "name", "bridge0", "type", "bridge"]
    tried = subprocess.run(trial, env=_PATH, capture_output=True, text=True, check=False)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


class Host:
    """A host that runs; ``address`` is its IP address on the switch."""

    def __init__(self, name: str, address: str = "", hosts_file: Path | None = None) -> None:
        self.name, self.address = name, address
        command = ["unshare", *_SPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", _BOOT, "sh", name, str(hosts_file or "")]
        self._holder = subprocess.Popen(command, env=_PATH, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "up\n"
        self.init = int(Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text())
        self._processes = os.readlink(f"/proc/{self.init}/ns/pid")

    def _inside(self, command: Sequence[str], folder: Path = Path("/")) -> list[str]:
        return ["nsenter", "--target", str(self.init), "--mount", "--uts", "--ipc", "--net", "--pid", f"--wd={folder}", "--", *command]

    def do(self, *command: str) -> str:
        """Run a command to its end; its output."""
        return subprocess.run(self._inside(command), env=_PATH, check=True, capture_output=True, text=True).stdout

    def start(self, command: Sequence[str], folder: Path, env: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start a command in a folder, with pipes from its stdout and stderr."""
        return subprocess.Popen(self._inside(command, folder), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def pids(self, *words: str) -> list[int]:
        """Processes on this host but PID 1, as seen from here, with all these words in command line and environment."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                text = (process / "cmdline").read_bytes() + b"\0" + (process / "environ").read_bytes()
                here = os.readlink(process / "ns" / "pid") == self._processes
            except OSError:
                continue
            if here and int(process.name) != self.init and {word.encode() for word in words} <= set(text.split(b"\0")):
                found.append(int(process.name))
        return found

    def off(self) -> None:
        """Switch the host off, as a power cut does."""
        self._holder.communicate("")


class Network:
    """The hosts, and the switch between them."""

    def __init__(self, switch: Host, hosts: Sequence[Host]) -> None:
        self._switch, self.hosts = switch, hosts
        switch.do("ip", "link", "add", "name", "bridge0", "type", "bridge")
        switch.do("ip", "link", "set", "bridge0", "up")
        for number, host in enumerate(hosts):
            cable = ["name", f"port{number}", "netns", str(switch.init), "type", "veth", "peer", "name", "eth0", "netns", str(host.init)]
            subprocess.run(["ip", "link", "add", *cable], env=_PATH, check=True)
            switch.do("ip", "link", "set", f"port{number}", "master", "bridge0", "up")
            host.do("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.do("ip", "link", "set", "eth0", "up")

    def cut(self, host: Host) -> None:
        """Take the host off the switch: nothing goes in or out, and nobody is told."""
        self._switch.do("ip", "link", "set", f"port{self.hosts.index(host)}", "nomaster")


@contextmanager
def network(count: int, folder: Path) -> Iterator[Network]:
    """``count`` hosts; the first one's name leads to its loopback, those of the others to nothing."""
    hosts_file = folder / "hosts"
    hosts_file.write_text("127.0.0.1 localhost\n127.0.1.1 alpha\n")
    names = ["alpha", "beta", "gamma", "delta"][:count]
    with ExitStack() as stack:
        made = []
        for number, name in enumerate(["switch", *names]):
            made.append(Host(name, f"10.77.0.{number}" if number else "", hosts_file))
            stack.callback(made[-1].off)
        yield Network(made[0], made[1:])
