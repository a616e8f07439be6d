"""MATLAB files (.mat, level 5) that may come from elsewhere, as plain Python values.

scipy reads them, but trusts them: it makes room for as many elements as a header says, and follows nested arrays however deep. So
every element is measured first. What scipy is given is unpacked, bounded, at most ``_DEPTH`` deep, and holds only numbers, text,
cells and structs.
"""

from __future__ import annotations

import io
import json
import math
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import parse_json, read_bytes, shorten

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
_MOST = 1 << 26  # bytes, packed and unpacked: lists of hundreds of thousands of images fit
_DEPTH = 8
_HEADER = 128
_INT8, _INT32, _UINT32, _MATRIX, _COMPRESSED = 1, 5, 6, 14, 15  # kinds of elements
_CELL, _STRUCT, _TEXT_AND_NUMBERS = 1, 2, {4, *range(6, 16)}  # classes of arrays
_COMPLEX = 0x0800


class _DamageError(Exception):
    """What is wrong, in words."""


class _Elements:
    """The elements of a file, walked as scipy will walk them, and required to fill exactly the space that they claim."""

    def __init__(self, data: bytes, order: str) -> None:
        self._data, self._order = data, order

    def check(self) -> None:
        """Refuse what scipy cannot be trusted with.

        Raises:
            _DamageError: an element is no array, does not fit into the one around it, claims more elements than it holds, or may hold code.
        """
        at = _HEADER
        while at < len(self._data):
            at = self._array(at, len(self._data), 1)

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

    def _array(self, at: int, end: int, depth: int) -> int:
        """Check an array and all inside; where the next element begins."""
        kind, size, at, after = self.tag(at, end)
        if kind != _MATRIX:
            raise _DamageError("an element is no array")
        if size == 0:
            return after
        if depth > _DEPTH:
            raise _DamageError(f"arrays lie in arrays more than {_DEPTH} deep")
        end = at + size
        flags, at = self._expect(_UINT32, at, end, "a header")
        sizes, at = self._expect(_INT32, at, end, "a size")
        _, at = self._expect(_INT8, at, end, "a name")
        if len(flags) != 8 or not sizes or len(sizes) % 4:
            raise _DamageError("a header has another length")
        dims = struct.unpack(f"{self._order}{len(sizes) // 4}i", sizes)
        count = math.prod(dims)
        if min(dims) < 0 or count > size:
            raise _DamageError(f"an array claims to be {shorten('x'.join(map(str, dims)))[1:-1]} in {size} bytes")
        (flag,) = struct.unpack_from(f"{self._order}I", flags)
        what = flag & 0xFF
        if what in _TEXT_AND_NUMBERS:
            for _ in range(2 if flag & _COMPLEX else 1):
                *_, at = self.tag(at, end)
        elif what in (_CELL, _STRUCT):
            if what == _STRUCT:
                length, at = self._expect(_INT32, at, end, "the length of field names")
                names, at = self._expect(_INT8, at, end, "field names")
                (width,) = struct.unpack(f"{self._order}i", length) if len(length) == 4 else (0,)
                if width < 1 or len(names) % width:
                    raise _DamageError("field names have no length")
                count *= len(names) // width
            if count * 8 > end - at:
                raise _DamageError(f"{count} elements cannot lie in {end - at} bytes")
            for _ in range(count):
                at = self._array(at, end, depth + 1)
        else:
            raise _DamageError("it holds a sparse array, an object or a function; only numbers, text, cells and structs are read")
        if at != end:
            raise _DamageError("an array does not fill its space")
        return after


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
    elements = _Elements(data, order)
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


def _plain(value: np.ndarray) -> Any:
    """A text or number for an array of one, a list for other arrays and cells, a list of dictionaries for structs."""
    if value.dtype.names:
        return [{name: _plain(element[name]) for name in value.dtype.names} for element in value.ravel()]
    if value.dtype.kind == "O":
        return [_plain(element) for element in value.ravel()]
    if value.dtype.kind == "U" and value.size == 0:
        return ""
    found = value.ravel().tolist()
    # MATLAB's numbers are floats unless somebody asks for others.
    found = [int(one) if isinstance(one, float) and one.is_integer() else one for one in found]
    return found[0] if len(found) == 1 else found


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
    from scipy.io import loadmat  # 0.2 s: only those who read such a file wait for it

    try:
        content, order = _unpacked(data)
        _Elements(content, order).check()
        variables = {name: _plain(value) for name, value in loadmat(io.BytesIO(content)).items() if not name.startswith("__")}
        found = json.dumps(variables)  # as JSON, so that values are checked where all foreign values are
    except _DamageError as error:
        raise InputError(f"{path} cannot be used: {error}{tail}") from None
    except Exception as error:  # foreign bytes make scipy, numpy and zlib raise almost anything
        raise InputError(f"{path} is damaged ({shorten(str(error), 200)[1:-1]}){tail}") from error
    return parse_json(found, shape, path, cure)
