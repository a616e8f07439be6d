"""Bytes that may come from elsewhere: a data set, a run directory or an environment that somebody else made.

Each kind of content has one reader. It bounds what it reads, checks the type of every value, executes nothing, and raises
InputError with the file's name, whatever the bytes are. Code that gets its values from here needs no check of its own. Those of
arrays and tensors are in ``arrays``.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from dnc_dist.base.errors import InputError

T = TypeVar("T")
JSON_OBJECT = TypeAdapter(dict[str, Any])
"""For ``parse_json``: an object of any values."""
MOST_BYTES = 1 << 28
"""A text file beyond this size is none of ours: the class names of ten million classes fit."""
_LEADS_NOWHERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        InputError: it is missing, no regular file (a pipe would wait for ever), or longer than ``most`` bytes.
        OSError: the machine cannot read it.
    """
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise InputError(f"{path} has {size:,} bytes, at most {most:,} are read; it is not what it should be")
        return file.read()


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file to read. A path that leads to none is wrong input. Other errors are those of the machine, and name the file."""
    try:
        with _open_regular(path) as file:
            yield file
    except OSError as error:
        if error.errno in _LEADS_NOWHERE:
            raise InputError(f"{path} cannot be read ({error.strerror})") from error
        error.filename = error.filename or str(path)
        raise


def _open_regular(path: Path) -> BinaryIO:
    try:
        # Without O_NONBLOCK already the opening of a pipe waits.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a name with a null character
        raise InputError(f"{path} cannot be read ({error})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is no regular file; give a file")
    return open(descriptor, "rb")


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The content of a UTF-8 file; a byte-order mark is passed over.

    Raises:
        InputError: as of ``read_bytes``, or it is not UTF-8.
        OSError: as of ``read_bytes``.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def parse_json(data: str | bytes, shape: type[T] | TypeAdapter[T], source: str | Path, cure: str = "") -> T:
    """JSON as a value of the given type: a dataclass, or any annotation that pydantic knows.

    Args:
        data: the JSON.
        shape: what it must be; no text is taken for a number.
        source: where it is from, for the message.
        cure: what the user can do about it.

    Raises:
        InputError: no JSON, too deep, or a value of another type; names the first wrong value.
    """
    adapter = shape if isinstance(shape, TypeAdapter) else TypeAdapter(shape)
    try:
        return adapter.validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        got = "" if first["type"] in ("json_invalid", "missing") else f" (got {shorten(first['input'])})"
        tail = f"; {cure}" if cure else ""
        raise InputError(f"{source} is damaged: {f'{where}: ' if where else ''}{first['msg']}{got}{tail}") from None


def read_json(path: Path, shape: type[T] | TypeAdapter[T], cure: str = "") -> T:
    """A JSON file as a value of the given type; see ``parse_json``.

    Raises:
        InputError: as of ``read_bytes``, or it holds something else.
        OSError: as of ``read_bytes``.
    """
    return parse_json(read_bytes(path), shape, path, cure)


def read_lines(path: Path, most: int = 1 << 20) -> Iterator[bytes]:
    """The complete lines of a file one by one, without keeping the whole; those longer than ``most`` bytes are passed over.

    Raises:
        InputError, OSError: as of ``read_bytes``.
    """
    with _opened(path) as file:
        long = False
        while line := file.readline(most):
            whole = line.endswith(b"\n")
            if whole and not long:
                yield line
            long = not whole


def environment_int(name: str, default: int | None = None, least: int = 0, most: int = 1 << 31) -> int:
    """A whole number from the environment.

    Raises:
        InputError: the variable is not set and has no default, or it is no number in [least, most].
    """
    text = os.environ.get(name)
    if text is None:
        if default is None:
            raise InputError(f"the environment variable {name} is not set; start with `dnc-dist launch`, torchrun or srun")
        return default
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise InputError(
            f"the environment variable {name} is {shorten(text)}, not a whole number from {least} to {most}; set it right or unset it"
        )
    return value


def printable(text: str) -> str:
    """Foreign text for a terminal: what would control it is shown with backslashes."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def read_table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """A CSV file: the columns, and each row with the number of the line that it ends on.

    Raises:
        InputError: it cannot be read, or is no CSV file.
    """
    content = read_text(path)
    if "\0" in content:
        line = content.count("\n", 0, content.index("\0")) + 1
        raise InputError(f"{path}, line {line}: a null character, so it is no CSV file; save it as UTF-8 text")
    reader = csv.DictReader(io.StringIO(content, newline=""))
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}; correct the line") from error
    columns = list(reader.fieldnames or [])
    if len(columns) == 1 and ";" in columns[0]:
        raise InputError(f"{path}: its columns are separated by semicolons; save it with commas")
    return columns, rows


def shorten(value: Any, most: int = 80) -> str:
    """A foreign value for a message: on one line, without control characters, not too long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"
