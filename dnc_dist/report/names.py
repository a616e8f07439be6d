"""Names of classes as the report shows them."""

from __future__ import annotations

import re
import unicodedata

_CODE = re.compile(r"u([0-9a-f]{4,6})")
_LONGEST = 300


def shown(name: str) -> str:
    """The name of a class; of one that is called by the code of a character, as the quickstart's are, the character."""
    return _character(name) or name[:_LONGEST]


def full(name: str) -> str:
    """The name as the data has it; of a character, too, with what Unicode calls it."""
    if character := _character(name):
        return f"{character} ({name}, {unicodedata.name(character, 'without a name')})"
    return name[:_LONGEST]


def _character(name: str) -> str:
    """The visible character that a name is the code of; nothing if it is none."""
    found = _CODE.fullmatch(name)
    code = int(found[1], 16) if found else 0
    return chr(code) if 0 < code <= 0x10FFFF and unicodedata.category(chr(code))[0] not in "CMZ" else ""
