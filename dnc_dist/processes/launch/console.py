"""What the launcher itself says."""

from __future__ import annotations

import os
from contextlib import suppress


def say(text: str) -> None:
    """Write a line to stderr in a way that a signal handler may; a launcher whose stderr is closed goes on unheard."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))
