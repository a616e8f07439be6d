"""Files that are written whole or not at all: readers see the old file or the new one, and a crash of the machine leaves one of them."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems write names at once and have no such call for folders.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write the new content of ``path`` to, which takes its place at the end; after an error it is removed.

    Raises:
        OSError: it cannot be written; names ``path``, as a full disk names no file.
    """
    # A name that nobody can have planted a link under, and that no other process writes to.
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync(path.parent)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(part)):
            error.filename, error.filename2 = str(path), None
        raise


def is_part_of(path: Path, name: str) -> bool:
    """Whether this is what a crash left of a new content of the file ``name``."""
    return path.name.startswith(f".{name}.") and path.suffix == ".part"


def write_text(path: Path, text: str) -> None:
    """Replace a text file; what is no UTF-8 is written with backslashes."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))
