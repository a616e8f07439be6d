"""What a check found, and how it is shown: a table for people, one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Status = Literal["ok", "warning", "failed"]

_WIDEST_VALUE = 72


class Check(NamedTuple):
    """One row: what was looked at, what was found, whether that is good, and what to do about it if not."""

    name: str
    value: str
    status: Status = "ok"
    hint: str = ""


class Section(NamedTuple):
    """The rows of one of env, data, network and parity. ``values`` are its numbers for programs.

    ``final``: the checks after it cannot run.
    """

    name: str
    note: str
    checks: list[Check]
    values: dict[str, Any]
    final: bool = False


def render(section: Section) -> str:
    """The section as lines of text: name, value, status, and a hint where there is something to do."""
    names = max(len(check.name) for check in section.checks)
    values = max((len(check.value) for check in section.checks if len(check.value) <= _WIDEST_VALUE), default=0)
    lines = [f"{section.name}: {section.note}"]
    for check in section.checks:
        line = f"  {check.name.ljust(names)}  {check.value.ljust(values)}  {check.status}"
        lines.append(f"{line.ljust(names + values + 13)}  {check.hint}".rstrip())
    return "\n".join(lines) + "\n"


def failures(sections: Sequence[Section]) -> list[str]:
    """The failed checks, as "section: check"."""
    return [f"{section.name}: {check.name}" for section in sections for check in section.checks if check.status == "failed"]


def as_json(sections: Sequence[Section], world_size: int) -> str:
    """One JSON object: world_size, passed, the checks of all sections, and the values of each section."""
    checks = [{"section": section.name, **check._asdict()} for section in sections for check in section.checks]
    values = {name: value for section in sections for name, value in section.values.items()}
    return json.dumps({"world_size": world_size, "passed": not failures(sections), "checks": checks, **values}, allow_nan=False)
