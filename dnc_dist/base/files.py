"""Files that are written whole or not at all: readers see the old file or the new one, and a crash of the machine leaves one of them."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TextIO

from dnc_dist.base.errors import InputError

_log = logging.getLogger(__name__)


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
def replacing(path: Path, *, mode: int = 0o666, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write the new content of ``path`` to, which takes its place at the end; after an error it is removed.

    Any number of processes, of any machines, may do so at the same time: the last one's content stays.

    Args:
        path: the file.
        mode: who may read and write the new one, less what the umask takes away.
        durable: wait for the disk. Without, a crash of the machine may leave a torn file: for what has a checksum of its own.

    Raises:
        OSError: it cannot be written; names ``path``, as a full disk names no file.
    """
    # A name that nobody can have planted a link under, and that no other process writes to: pids are the same in other containers.
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb", opener=partial(os.open, mode=mode)) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        part.replace(path)
        if durable:
            sync(path.parent)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(part)):
            error.filename, error.filename2 = str(path), None
        raise


def lock(path: Path, busy: str) -> TextIO:
    """An open file that no other process can lock as long as this one keeps it open. A record lock: forked processes do not hold it.

    Where the file system has no locks, a warning asks for care instead.

    Raises:
        InputError: another process has it; the message is ``busy``.
    """
    file = path.open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(busy) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            file.close()
            raise
        _log.warning("%s: this file system has no locks; take care that only one process at a time uses the folder", path.parent)
    return file


def is_part_of(path: Path, name: str) -> bool:
    """Whether this is what a crash left of a new content of the file ``name``."""
    return path.name.startswith(f".{name}.") and path.suffix == ".part"


def write_text(path: Path, text: str) -> None:
    """Replace a text file; what is no UTF-8 is written with backslashes."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))
