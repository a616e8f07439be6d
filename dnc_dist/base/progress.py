"""Progress of long phases on the console: count, rate, time left; one line that updates itself, or rare plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO


def format_seconds(seconds: float) -> str:
    """``75`` -> ``1:15``, ``3675`` -> ``1:01:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Phase:
    """One phase with a known number of units."""

    def __init__(
        self, name: str, total: int, unit: str, write: Callable[[str, bool], None], clock: Callable[[], float], done: int = 0
    ) -> None:
        self._name, self._total, self._unit, self._write, self._clock = name, total, unit, write, clock
        self._start = clock()
        self._done = self._done_before = done
        self._note = ""

    def update(self, count: int = 1, note: str = "") -> None:
        """Count finished units; the note stays until the next one."""
        self._done += count
        self._note = note or self._note
        if self._done < self._total:  # the last line is close()'s
            self._write(self._line(), False)

    def advance_to(self, done: int, total: int) -> None:
        """Count up to ``done`` of ``total`` units; all of them close the phase."""
        self._total = total
        self.update(done - self._done) if done < self._total else self._finish()

    def _finish(self) -> None:
        self._done = self._total
        self.close()

    def close(self) -> None:
        """Write the last line."""
        self._write(self._line(), True)

    def _line(self) -> str:
        elapsed = self._clock() - self._start
        rate = (self._done - self._done_before) / elapsed if elapsed > 0 else 0.0
        parts = [f"{self._name}: {self._done}/{self._total} {self._unit}"]
        if rate > 0:
            parts.append(f"{rate:.3g} {self._unit}/s" if rate < 1000 else f"{rate:.0f} {self._unit}/s")
        if self._done >= self._total:
            parts.append(f"in {format_seconds(elapsed)}")
        elif rate > 0:
            parts.append(f"{format_seconds((self._total - self._done) / rate)} left")
        return ", ".join([*parts, *([self._note] if self._note else [])])


class Progress:
    """Where phases report to. Not enabled (every rank but 0): silent.

    Args:
        enabled: whether to write at all.
        stream: by default stderr, so that stdout holds results only.
        clock: seconds, for tests.
    """

    def __init__(self, enabled: bool, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._enabled, self._clock = enabled, clock
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._interval = 0.1 if self._terminal else 10.0  # seconds between two lines
        self._last = clock()
        self._width = 0

    @contextmanager
    def phase(self, name: str, total: int, unit: str = "steps", done: int = 0) -> Iterator[Phase]:
        """A phase of ``total`` units, ``done`` of them before; its last line is written at the end, also after an exception."""
        self._last = self._clock()
        phase = Phase(name, total, unit, self._write, self._clock, done)
        try:
            yield phase
        finally:
            phase.close()

    def counter(self, name: str, unit: str) -> Callable[[int, int], None]:
        """A callback (done, total) for a function that counts by itself and begins now; the last line is written when all is done."""
        self._last = self._clock()
        return Phase(name, 0, unit, self._write, self._clock).advance_to

    def _write(self, line: str, final: bool) -> None:
        now = self._clock()
        if not self._enabled or (not final and now - self._last < self._interval):
            return
        self._last = now
        if self._terminal:
            self._stream.write(f"\r{line.ljust(self._width)}" + ("\n" if final else ""))
            self._width = 0 if final else len(line)
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()
