"""The readers of foreign bytes: what they give, what they bound, and that they raise InputError with the file's name for all else."""

from __future__ import annotations

import errno
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dnc_dist.base.arrays import Array, read_arrays, read_column, read_tensors
from dnc_dist.base.errors import InputError, RunError, explain
from dnc_dist.base.foreign import JSON_OBJECT, environment_int, parse_json, printable, read_bytes, read_json, read_lines, read_text, shorten
from dnc_dist.base.wording import listed


@dataclass
class Entry:
    size: int
    name: str = ""


def refused(read: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        read()
    return str(caught.value)


@pytest.mark.parametrize("read", [read_bytes, read_text, lambda path: list(read_lines(path)), lambda path: read_arrays(path, {})])
def test_what_is_no_file(read: Callable[[Path], Any], tmp_path: Path) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    for name, expected in (
        (".", f"{tmp_path} is no regular file; give a file"),
        ("pipe", f"{tmp_path}/pipe is no regular file; give a file"),
        ("none", f"{tmp_path}/none cannot be read (No such file or directory)"),
        ("dangling", f"{tmp_path}/dangling cannot be read (No such file or directory)"),
        ("circle", f"{tmp_path}/circle cannot be read (Too many levels of symbolic links)"),
    ):
        assert refused(lambda name=name: read(tmp_path / name)) == expected
    assert "cannot be read (embedded null byte)" in refused(lambda: read(Path("a\0b")))
    assert len(os.listdir("/proc/self/fd")) <= open_before, "a refused file is closed"


def test_text_for_a_terminal_does_not_control_it() -> None:
    assert printable("café 日本 \x1b]0;owned\x07\x1b[2J\u202e\n") == "café 日本 \\x1b]0;owned\\x07\\x1b[2J\\u202e\\n"


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9")
    assert read_text(path) == "café"
    assert refused(lambda: read_text(path, most=4)) == f"{path} has 8 bytes, at most 4 are read; it is not what it should be"
    path.write_bytes(b"caf\xe9")
    assert refused(lambda: read_text(path)) == f"{path} is not UTF-8 text (unexpected end of data at byte 3); save it as UTF-8"


@pytest.mark.parametrize(
    ("text", "shape", "expected"),
    [
        ('{"size": 3, "name": "x"}', Entry, Entry(3, "x")),
        ('{"a": [1, "x"]}', dict[str, tuple[int, str]], {"a": (1, "x")}),
        ('{"a": NaN}', dict[str, int], "f is damaged: a: Input should be a valid integer (got nan)"),
        ('{"size": "3"}', Entry, "f is damaged: size: Input should be a valid integer (got '3')"),
        ('{"size": true}', Entry, "f is damaged: size: Input should be a valid integer (got True)"),
        ('{"size": 1e400}', Entry, "f is damaged: size: Input should be a"),
        ("{}", Entry, "f is damaged: size: Field required; do this"),
        ("[]", Entry, "f is damaged: Input should be an object (got [])"),
        ("", Entry, "f is damaged: Invalid JSON"),
        ("[" * 100_000, JSON_OBJECT, "f is damaged: Invalid JSON: recursion limit exceeded"),
        ('{"a": ' * 100_000, JSON_OBJECT, "f is damaged: Invalid JSON: recursion limit exceeded"),
        (b"\xff\xfe", JSON_OBJECT, "f is damaged: Invalid JSON"),
        ('{"a": "\\ud800"}', JSON_OBJECT, "f is damaged: Invalid JSON"),
        ("9" * 100_000, int, "f is damaged: "),
    ],
)
def test_json(text: str | bytes, shape: Any, expected: Any) -> None:
    if isinstance(expected, str):
        message = refused(lambda: parse_json(text, shape, "f", "do this"))
        assert message.startswith(expected) and message.endswith("; do this") and len(message) < 300
    else:
        assert parse_json(text, shape, "f") == expected


def test_json_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text('{"a": 1.5}')
    assert refused(lambda: read_json(tmp_path / "f.json", dict[str, int])).startswith(f"{tmp_path}/f.json is damaged: a: ")


def test_lines_are_whole_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\n" + b"x" * 50 + b"\ntwo\n\n" + b"y" * 20 + b"\nhalf")
    assert list(read_lines(path, most=10)) == [b"one\n", b"two\n", b"\n"]
    assert [len(line) for line in read_lines(path)] == [4, 51, 4, 1, 21]


def test_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    shapes = {"x": Array("f", 2), "n": Array("i", 0)}
    np.savez(path, x=np.zeros((2, 3)), n=7, more=np.zeros(1))
    found = read_arrays(path, shapes)
    assert set(found) == {"x", "n"} and found["n"] == 7
    assert refused(lambda: read_arrays(path, {"y": Array("f", 1)}, "do this")).endswith("; do this")
    assert "x is an array of float64 with 2 dimension(s)" in refused(lambda: read_arrays(path, {"x": Array("f", 1)}))
    assert "at most 10 are read" in refused(lambda: read_arrays(path, shapes, most=10))
    whole = path.read_bytes()
    for content in (b"", b"PK", whole[:100], whole[:-30], whole.replace(b"NUMPY", b"numpy"), b"\0" * 1000):
        path.write_bytes(content)
        assert refused(lambda: read_arrays(path, shapes)).startswith(f"{path} is damaged (")


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), RunError, "{}: Stale file handle; check the shared folder"),
        (OSError(errno.EIO, "Input/output error"), RunError, "{}: Input/output error; check the disk"),
        (OSError(errno.EACCES, "Permission denied"), InputError, "{}: Permission denied; change its permissions"),
        (MemoryError("Unable to allocate 3 TiB"), RunError, "out of memory (Unable to allocate 3 TiB); use a machine with more"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RunError, "out of memory (DefaultCPUAllocator: can't"),
        (RuntimeError("unable to mmap: Cannot allocate memory (12)"), RunError, "out of memory (unable to mmap: Cannot allocate"),
        (OSError(errno.EINVAL, "Invalid argument"), InputError, "{} is damaged ([Errno 22] Invalid argument); do this"),
        (OSError("no more bytes"), InputError, "{} is damaged (no more bytes); do this"),
    ],
    ids=["stale", "disk", "permission", "memory", "torch's memory", "mapped memory", "a place that is none", "a library's"],
)
def test_what_the_machine_refuses_is_no_damage(
    error: Exception, kind: type[Exception], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each ends a command with one message that is true and, where the machine does not say it, names the file."""
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    np.save(tmp_path / "a.npy", np.zeros(3))
    torch.save({"x": torch.zeros(3)}, tmp_path / "a.pt")

    def fail(*told: object, **options: object) -> None:
        raise copy(error)  # an error that was raised once knows a file

    for place in ("torch.load", "numpy.lib.format.open_memmap", "numpy.lib.format.read_array"):
        monkeypatch.setattr(place, fail)
    for name, read in {
        "a.npz": lambda path: read_arrays(path, {"x": Array("f", 1)}, "do this"),
        "a.npy": lambda path: read_column(path, Array("f", 1), "do this"),
        "a.pt": lambda path: read_tensors(path, "do this"),
    }.items():
        with pytest.raises((InputError, OSError, MemoryError)) as caught:
            read(tmp_path / name)
        said = explain(caught.value)
        assert type(said) is kind and str(said).startswith(says.format(tmp_path / name)), said


def test_a_disk_that_fails_at_the_end_of_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There zipfile looks first, and calls every failure a file of another kind."""
    np.savez(tmp_path / "a.npz", x=np.zeros(3))

    def fail(file: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(zipfile, "_EndRecData", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        read_arrays(tmp_path / "a.npz", {"x": Array("f", 1)})
    assert caught.value.filename == str(tmp_path / "a.npz")


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_what_the_machine_cannot_read_is_not_wrong_input(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, flags: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    for read in (read_bytes, read_text, lambda path: read_json(path, Entry), lambda path: list(read_lines(path))):
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            read(tmp_path / "file")
        assert caught.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize("reader", ["npz", "npy"])
def test_items_without_bytes_are_not_made(tmp_path: Path, reader: str) -> None:
    """Texts of length 0: a header alone would mean ten billion of them."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<U0", "fortran_order": False, "shape": (10**10,)})
    path = tmp_path / f"a.{reader}"
    if reader == "npy":
        path.write_bytes(file.getvalue())
        said = refused(lambda: read_column(path, Array("U", 1)))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", file.getvalue())
        said = refused(lambda: read_arrays(path, {"x": Array("U", 1)}))
    assert said.startswith(f"{path} is damaged: ") and "an array of <U0" in said


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_object_is_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([Canary(tmp_path / "fired")], dtype=object))
    assert refused(lambda: read_arrays(tmp_path / "a.npz", {"x": Array("O", 1)})).startswith(f"{tmp_path}/a.npz is damaged (")
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Canary(tmp_path / "fired")))
    assert "is damaged" in refused(lambda: read_arrays(tmp_path / "b.npz", {"x": Array("O", 1)}))
    assert not (tmp_path / "fired").exists()


def test_a_small_archive_of_huge_arrays_is_not_unpacked(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)})
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue())
    assert "is damaged" in refused(lambda: read_arrays(tmp_path / "lie.npz", {"x": Array("f", 1)}))
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(1 << 24))
    assert (tmp_path / "bomb.npz").stat().st_size < 1 << 15
    assert "unpacks to" in refused(lambda: read_arrays(tmp_path / "bomb.npz", {"x": Array("f", 1)}, most=1 << 20))


@pytest.mark.parametrize(
    ("text", "expected"), [("3", 3), (" 4 ", 4), ("abc", None), ("-1", None), ("1.5", None), ("9" * 5000, None), ("", None)]
)
def test_a_number_of_the_environment(text: str, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBER", text)
    if expected is None:
        assert "the environment variable NUMBER is " in refused(lambda: environment_int("NUMBER"))
    else:
        assert environment_int("NUMBER") == expected
    monkeypatch.delenv("NUMBER")
    assert environment_int("NUMBER", 5) == 5
    assert "NUMBER is not set" in refused(lambda: environment_int("NUMBER"))


def test_a_foreign_value_in_a_message() -> None:
    assert shorten("a\n\x1b[31m") == r"'a\n\x1b[31m'"
    assert len(shorten("x" * 1000)) == 80


def test_of_many_things_the_first_are_listed() -> None:
    assert listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a; b; c"
    assert listed([f"{number}\x1b" for number in range(1234)], 2) == "0\\x1b; 1\\x1b; and 1,232 more"
