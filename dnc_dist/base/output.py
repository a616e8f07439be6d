"""Standard output and error that somebody may stop to read: a closed terminal, a full disk or a reader that left ends no work."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


class Output:
    """A stream that nobody has to read: what cannot be written is dropped (all that matters stands in the run directory, too), and
    characters that it does not know are escaped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, and keep nothing back: only so the next line of a disk that has room again follows the last one."""
        encoding = self._stream.encoding or "utf-8"
        with suppress(OSError):
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Try to write what is left."""
        with suppress(OSError):
            self._stream.flush()


def settle(stream: TextIO) -> None:
    """Get rid of what a stream could not write, so that Python does not fail on it when it flushes at exit."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def reader_left() -> bool:
    """Whether nobody reads standard output any more, as behind ``| head`` once it has its lines."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # it is no file
        return False


def end_quietly() -> None:
    """Once the cause is said: what then fails in taking half-made objects apart is a consequence (until ``unheard`` is left)."""
    sys.unraisablehook = lambda unraisable: None


@contextmanager
def unheard(*, results: bool) -> Iterator[None]:
    """Work that goes on whatever becomes of standard error; with ``results`` of standard output, too."""
    out, err, hook = sys.stdout, sys.stderr, sys.unraisablehook
    try:
        with redirect_stderr(Output(err)), redirect_stdout(Output(out) if results else out):
            yield
    finally:
        sys.unraisablehook = hook
        settle(out)
        settle(err)


def open_streams() -> None:
    """Give this process the standard streams that it was started without (as by ``2>&-``), and let none refuse a character."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # Lower numbers are open by now, so this one is the next: a file of ours must never be somebody's standard error.
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
