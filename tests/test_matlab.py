"""MATLAB files: what scipy writes is read, and whatever else the bytes are, there is one message and nothing grows."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io.matlab
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy import sparse
from scipy.io import loadmat, savemat

from dnc_dist.base import matlab
from dnc_dist.base.errors import InputError
from dnc_dist.base.matlab import read_mat

ANY = TypeAdapter(dict[str, Any])


def saved(**variables: Any) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, variables, do_compression=False)
    return buffer.getvalue()


def structs(*rows: tuple[Any, Any]) -> np.ndarray:
    array = np.empty((1, len(rows)), [("name", object), ("number", object)])
    for at, (name, number) in enumerate(rows):
        array[0, at]["name"], array[0, at]["number"] = name, number
    return array


WHOLE = saved(rows=structs(("a/é.jpg", 3), ("", 4.5)), names=np.array([["x", "y z"]], object), one=7.0, many=[1, 2, 3])


@pytest.mark.parametrize("compressed", [False, True])
def test_values(compressed: bool, tmp_path: Path) -> None:
    variables = {"rows": structs(("a/é.jpg", 3), ("", 4.5)), "names": np.array([["x", "y z"]], object), "one": 7.0, "many": [1, 2, 3]}
    savemat(tmp_path / "file.mat", variables, do_compression=compressed)
    rows = [{"name": "a/é.jpg", "number": 3}, {"name": "", "number": 4.5}]
    assert read_mat(tmp_path / "file.mat", ANY) == {"rows": rows, "names": ["x", "y z"], "one": 7, "many": [1, 2, 3]}


def plain(value: np.ndarray) -> Any:
    """What scipy read, as it should be read here."""
    if value.dtype.names:
        return [{name: plain(one[name]) for name in value.dtype.names} for one in value.ravel("F")]
    if value.dtype.kind == "O":
        return [plain(one) for one in value.ravel("F")]
    if value.dtype.kind == "U":
        return str(value[0]) if value.size else ""
    found = value.ravel("F").tolist()
    return found[0] if len(found) == 1 else found


# Files that MATLAB itself wrote, of several versions and byte orders, which scipy ships.
SHIPPED = Path(scipy.io.matlab.__file__).parent / "tests" / "data"
KINDS = ("cell", "cellnest", "structarr", "structnest", "emptycell", "string", "onechar", "unicode", "matrix", "double", "minus")
WRITTEN_BY_MATLAB = sorted(path.name for kind in KINDS for path in SHIPPED.glob(f"test{kind}_[567]*.mat"))


def test_there_are_files_of_matlab() -> None:
    assert {name.partition("_")[0] for name in WRITTEN_BY_MATLAB} == {f"test{kind}" for kind in KINDS}, f"scipy has not all in {SHIPPED}"


@pytest.mark.parametrize("name", WRITTEN_BY_MATLAB)
def test_files_of_matlab(name: str) -> None:
    expected = {key: plain(value) for key, value in loadmat(SHIPPED / name).items() if not key.startswith("__")}
    assert read_mat(SHIPPED / name, ANY) == expected


def array(what: int, dims: tuple[int, ...], *inside: bytes, name: bytes = b"") -> bytes:
    """An array of this class as it lies in a file."""

    def element(kind: int, data: bytes) -> bytes:
        return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)

    body = element(6, struct.pack("<II", what, 0)) + element(5, struct.pack(f"<{len(dims)}i", *dims)) + element(1, name)
    return struct.pack("<II", 14, len(body) + sum(map(len, inside))) + body + b"".join(inside)


def nested(depth: int) -> bytes:
    inner = array(1, (0, 0))
    for _ in range(depth):
        inner = array(1, (1, 1), inner)
    return inner


def bomb() -> bytes:
    packed = zlib.compress(bytes(1 << 20))
    return struct.pack("<II", 15, len(packed)) + packed


HEADER = WHOLE[:128]
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "level 5"),
    "a page of the web": (b"<!DOCTYPE html>" * 100, "level 5"),
    "format 7.3": (b"MATLAB 7.3 MAT-file".ljust(128), "save -v7"),
    "cut off": (WHOLE[:-20], "reaches beyond"),
    "cut in a tag": (WHOLE + b"\0\0\0", "cut off"),
    "huge cell": (HEADER + array(1, (2**30, 1)), "claims to be 1073741824x1"),
    "huge text": (HEADER + array(4, (1, 2**30), struct.pack("<II", 16, 0)), "claims to be"),
    "negative": (HEADER + array(1, (-1, 1)), "claims to be"),
    "more elements than bytes": (HEADER + array(1, (40, 1)), "40 elements cannot lie in"),
    "deep": (HEADER + nested(1000), "more than 8 deep"),
    "an object": (HEADER + array(3, (1, 1)), "an object or a function"),
    "sparse": (saved(x=sparse.eye_array(3, format="csc")), "sparse"),
    "no array": (HEADER + struct.pack("<II", 9, 8) + bytes(8), "is no array"),
    "left over": (HEADER + array(6, (1, 1), struct.pack("<IId", 9, 8, 1.0), bytes(8)), "does not fill"),
    "damaged compression": (HEADER + struct.pack("<II", 15, 4) + b"abcd", "is damaged"),
    "cut compression": (HEADER + struct.pack("<II", 15, 12) + zlib.compress(bytes(1000))[:12], "cut off"),
    "complex": (saved(x=1j), "complex"),
    "text that is none": (HEADER + array(4, (1, 2), struct.pack("<II", 16, 2) + b"\xff\xfe".ljust(8, b"\0")), "is damaged"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_files(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    (tmp_path / "file.mat").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_mat(tmp_path / "file.mat", ANY, "take another")
    assert str(tmp_path / "file.mat") in str(caught.value) and str(caught.value).endswith("; take another")


def test_what_unpacks_to_too_much_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matlab, "_MOST", 1 << 18)
    (tmp_path / "file.mat").write_bytes(HEADER + bomb())
    with pytest.raises(InputError, match="unpacks to more than"):
        read_mat(tmp_path / "file.mat", ANY)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=4)), min_size=1, max_size=3))
def test_any_damage_gives_values_or_a_message(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]]) -> None:
    content = bytearray(WHOLE)
    for at, new in changes:
        content[at : at + len(new)] = new
    path = tmp_path_factory.getbasetemp() / "damaged.mat"
    path.write_bytes(content)
    try:
        assert isinstance(read_mat(path, ANY), dict)
    except InputError as error:
        assert str(path) in str(error)
