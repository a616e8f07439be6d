"""MATLAB files (.mat, level 5) that may come from elsewhere, as plain Python values.

scipy reads them, too, but trusts them: it makes room for as many elements as a header says, follows nested arrays however deep, and
some damaged files end the process. So they are read here, as MathWorks describes them ("MAT-File Format"): every size is bounded by
the bytes that are there.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import parse_json, read_bytes, shorten

T = TypeVar("T")
_MOST = 1 << 26  # bytes, packed and unpacked: lists of hundreds of thousands of images fit
_DEPTH = 8  # arrays in arrays
_HEADER = 128
_INT8, _INT32, _UINT32, _MATRIX, _COMPRESSED = 1, 5, 6, 14, 15  # kinds of elements
# Kind of element -> how its numbers are coded, as struct writes it; and how its text is.
_NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_CELL, _STRUCT, _TEXT, _NUMERIC = 1, 2, 4, range(6, 16)  # classes of arrays
_COMPLEX = 0x0800


class _DamageError(Exception):
    """What is wrong, in words."""


class _Reader:
    """The elements of a file without compression."""

    def __init__(self, data: bytes, order: str) -> None:
        self._data, self._order = data, order

    def variables(self) -> dict[str, Any]:
        """All variables by name.

        Raises:
            _DamageError: an element is no array, does not fill the space that it claims, or is of a class that is not read.
        """
        found, at = {}, _HEADER
        while at < len(self._data):
            name, value, at = self._array(at, len(self._data), 1)
            found[name] = value
        return found

    def tag(self, at: int, end: int) -> tuple[int, int, int, int]:
        """Kind and size of the element that begins here, where its body begins, and where the next one does."""
        if end - at < 8:
            raise _DamageError("an element is cut off")
        kind, size = struct.unpack_from(f"{self._order}II", self._data, at)
        if kind >> 16:  # up to 4 bytes lie in the tag itself
            kind, size, body, after = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        else:
            body, after = at + 8, at + 8 + size + (-size % 8 if kind != _COMPRESSED else 0)
        if body + size > end or after > end:
            raise _DamageError("an element reaches beyond the one around it")
        return kind, size, body, after

    def _expect(self, kind: int, at: int, end: int, what: str) -> tuple[bytes, int]:
        found, size, body, after = self.tag(at, end)
        if found != kind:
            raise _DamageError(f"{what} is of another type")
        return self._data[body : body + size], after

    def _array(self, at: int, end: int, depth: int) -> tuple[str, Any, int]:
        """Name and value of an array, and where the next element begins."""
        kind, size, at, after = self.tag(at, end)
        if kind != _MATRIX:
            raise _DamageError("an element is no array")
        if size == 0:
            return "", [], after
        if depth > _DEPTH:
            raise _DamageError(f"arrays lie in arrays more than {_DEPTH} deep")
        end = at + size
        flags, at = self._expect(_UINT32, at, end, "a header")
        sizes, at = self._expect(_INT32, at, end, "a size")
        name, at = self._expect(_INT8, at, end, "a name")
        if len(flags) != 8 or not sizes or len(sizes) % 4:
            raise _DamageError("a header has another length")
        dims = struct.unpack(f"{self._order}{len(sizes) // 4}i", sizes)
        count = math.prod(dims)
        if min(dims) < 0 or count > size:
            raise _DamageError(f"an array claims to be {shorten('x'.join(map(str, dims)))[1:-1]} in {size} bytes")
        (flag,) = struct.unpack_from(f"{self._order}I", flags)
        what = flag & 0xFF
        value: Any
        if what == _TEXT:
            value, at = self._text(dims, at, end)
        elif what in _NUMERIC and not flag & _COMPLEX:
            value, at = self._numbers(count, at, end)
        elif what == _CELL:
            value, at = self._arrays(count, at, end, depth)
        elif what == _STRUCT:
            value, at = self._structs(count, at, end, depth)
        else:
            raise _DamageError("a sparse or complex array, an object or a function; only numbers, text, cells and structs are read")
        if at != end:
            raise _DamageError("an array does not fill its space")
        return name.decode("latin-1"), value, after

    def _text(self, dims: tuple[int, ...], at: int, end: int) -> tuple[str, int]:
        kind, size, body, after = self.tag(at, end)
        if len(dims) != 2 or dims[0] > 1 or kind not in _TEXTS:
            raise _DamageError("a text has several lines or another code")
        code = _TEXTS[kind] + {"<": "-le", ">": "-be"}[self._order] if kind in (4, 17, 18) else _TEXTS[kind]
        return self._data[body : body + size].decode(code), after

    def _numbers(self, count: int, at: int, end: int) -> tuple[Any, int]:
        """One number, or a list of them column by column."""
        kind, size, body, after = self.tag(at, end)
        code = _NUMBERS.get(kind)
        if code is None or size != count * struct.calcsize(code):
            raise _DamageError(f"{count} numbers in {size} bytes")
        found = struct.unpack_from(f"{self._order}{count}{code}", self._data, body)
        # MATLAB's numbers are floats unless somebody asks for others.
        values = [int(one) if isinstance(one, float) and one.is_integer() else one for one in found]
        return values[0] if count == 1 else values, after

    def _arrays(self, count: int, at: int, end: int, depth: int) -> tuple[list[Any], int]:
        if count * 8 > end - at:
            raise _DamageError(f"{count} elements cannot lie in {end - at} bytes")
        values = []
        for _ in range(count):
            _, value, at = self._array(at, end, depth + 1)
            values.append(value)
        return values, at

    def _structs(self, count: int, at: int, end: int, depth: int) -> tuple[list[dict[str, Any]], int]:
        length, at = self._expect(_INT32, at, end, "the length of field names")
        packed, at = self._expect(_INT8, at, end, "field names")
        (width,) = struct.unpack(f"{self._order}i", length) if len(length) == 4 else (0,)
        if width < 1 or not packed or len(packed) % width:
            raise _DamageError("field names have no length")
        names = [packed[first : first + width].split(b"\0")[0].decode("latin-1") for first in range(0, len(packed), width)]
        values, at = self._arrays(count * len(names), at, end, depth)
        return [dict(zip(names, values[first : first + len(names)], strict=True)) for first in range(0, len(values), len(names))], at


def _unpacked(data: bytes) -> tuple[bytes, str]:
    """The same file without compression, and its byte order as struct writes it.

    Raises:
        _DamageError: no such file, or one that unpacks to more than ``_MOST`` bytes.
    """
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if data.startswith(b"MATLAB 7.3"):
        raise _DamageError("it has MATLAB's format 7.3, which is not read; save it with `save -v7`")
    if order is None or struct.unpack_from(f"{order}H", data, 124)[0] != 0x0100:
        raise _DamageError("it is no MATLAB file of level 5")
    parts, room, at = [data[:_HEADER]], _MOST, _HEADER
    elements = _Reader(data, order)
    while at < len(data):
        kind, size, body, after = elements.tag(at, len(data))
        part = data[at:after]
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            part = unpacker.decompress(data[body : body + size], room + 1)
            if len(part) <= room and not unpacker.eof:
                raise _DamageError("a compressed element is cut off")
        room -= len(part)
        if room < 0:
            raise _DamageError(f"it unpacks to more than {_MOST:,} bytes")
        parts.append(part)
        at = after
    return b"".join(parts), order


def read_mat(path: Path, shape: type[T] | TypeAdapter[T], cure: str = "") -> T:
    """The variables of a .mat file, of the given type: numbers, texts, lists (cells) and lists of objects (structs).

    Args:
        path: the file.
        shape: what the dictionary of its variables must be; no text is taken for a number.
        cure: what the user can do about a damaged one.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    tail = f"; {cure}" if cure else ""
    data = read_bytes(path, _MOST)
    try:
        # As JSON, so that values are checked where all foreign values are.
        found = json.dumps(_Reader(*_unpacked(data)).variables())
    except _DamageError as error:
        raise InputError(f"{path} cannot be used: {error}{tail}") from None
    except (zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({shorten(str(error), 200)[1:-1]}){tail}") from error
    return parse_json(found, shape, path, cure)
