"""Processes with mounts of their own: small disks, and a /dev/shm as containers have it."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.process_server import SERVER

_CLONE_NEWNS = 0x20000
_NOT_PERMITTED = 77


def mount(place: Path | str, options: str) -> None:
    """An empty file system in memory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)


def _alone(function: Callable[..., None], *args: Any) -> None:
    if ctypes.CDLL(None).unshare(_CLONE_NEWNS):
        os._exit(_NOT_PERMITTED)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    function(*args)


def in_own_mounts(function: Callable[..., None], *args: Any, timeout: float = 120) -> None:
    """Call a module-level function in a process whose mounts nobody else sees; it must end without an error in time."""
    process = SERVER.Process(target=_alone, args=(function, *args))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"still running after {timeout} s")
    if process.exitcode == _NOT_PERMITTED:
        pytest.skip("a process may not have mounts of its own here")
    assert process.exitcode == 0
