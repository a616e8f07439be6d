"""Signals while processes are being started: neither they nor a half-done start are hit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from dnc_dist.processes.signals import STOP_SIGNALS, signals_held


def test_a_signal_comes_when_the_start_is_done() -> None:
    """Whichever thread the system gives it to."""
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    after = False
    try:
        with pytest.raises(KeyboardInterrupt), signals_held(signal.SIGINT):
            os.kill(os.getpid(), signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            after = True
    finally:
        done.set()
        other.join()
    assert after and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_process_starts_deaf() -> None:
    """From its first instruction on, long before it could say so itself."""
    with signals_held(signal.SIGINT):
        child = subprocess.Popen([sys.executable, "-c", "print(input())"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child.send_signal(signal.SIGINT)
    assert child.communicate("went on")[0] == "went on\n" and child.returncode == 0


def test_in_another_thread() -> None:
    """It has no handlers to keep."""
    failed = list[Exception]()

    def start() -> None:
        try:
            with signals_held(signal.SIGINT):
                assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert not failed


_SERVER = """
import signal
from multiprocessing import forkserver
from pathlib import Path
from dnc_dist.data.workers import start_server
start_server()
status = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/status").read_text()
print(int(status.split("SigBlk:")[1].split()[0], 16))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_server_of_loader_workers_starts_deaf() -> None:
    """Also to what Python's own tracker of shared memory, which starts on the way, would let through."""
    done = subprocess.run([sys.executable, "-c", _SERVER], capture_output=True, text=True, check=True)
    held = int(done.stdout)
    assert [number for number in STOP_SIGNALS if not held >> (number - 1) & 1] == []
