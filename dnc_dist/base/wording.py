"""How messages say things."""

from __future__ import annotations

from collections.abc import Sequence

from dnc_dist.base.foreign import printable


def listed(parts: Sequence[str], most: int = 3) -> str:
    """The first of some parts, on one line, and how many more there are; they may be foreign text."""
    more = f"; and {len(parts) - most:,} more" if len(parts) > most else ""
    return printable("; ".join(parts[:most]) + more)
