"""A configuration as a flat table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of a tree with its dotted key, as `--set` takes it."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
