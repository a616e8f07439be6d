"""What was read of files on servers, kept in a folder: in blocks with a checksum, up to a limit, for any number of processes.

A training reads everything once an epoch. What is kept is as useful as what would take its place, so nothing is ever removed: once the
folder is full, the rest is read from the server in every epoch.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from dnc_dist.base.files import replacing

BLOCK = 2 << 20
_DIGEST = 16
_COUNT = "bytes"  # a file: how many bytes the folder holds
_UNUSABLE = {errno.ENOSPC, errno.EDQUOT}


class BlockCache:
    """Blocks of files in a folder; ``most`` bytes of them. Safe to pickle."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most

    def recount(self) -> int:
        """Look how many bytes are there: a process that was killed may have counted one that it never wrote."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self._count(lambda _: sum(path.stat().st_size for path in self.folder.glob("*/*/*.block")))

    def _count(self, change: Callable[[int], int]) -> int:
        """Change the number of bytes that are counted; only one process at a time does."""
        with open(self.folder / _COUNT, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            count = change(int(text) if text.isdecimal() else 0)
            file.truncate(0)
            file.write(str(count))
            file.flush()
            return count

    def path(self, dataset: str, name: str, block: int) -> Path:
        """Where a block of a file lies."""
        return self.folder / dataset / name / f"{block:06d}.block"

    def read(self, path: Path) -> bytes | None:
        """A block; None if it is not there or not whole."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        data, digest = content[:-_DIGEST], content[-_DIGEST:]
        return data if hashlib.blake2b(data, digest_size=_DIGEST).digest() == digest else None

    def write(self, path: Path, data: bytes) -> None:
        """Keep a block, if there is room. Two processes may write the same one; the second replaces the first."""
        length = len(data) + _DIGEST
        fits = False

        def reserve(count: int) -> int:
            nonlocal fits
            fits = count + length <= self.most
            return count + length if fits else count

        self._count(reserve)
        if not fits:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, durable=False) as file:
                file.write(data + hashlib.blake2b(data, digest_size=_DIGEST).digest())
                again = path.exists()
        except OSError as error:
            self._count(lambda count: count - length)
            if error.errno not in _UNUSABLE:  # a full disk: the run does without
                raise
            return
        if again:
            self._count(lambda count: count - length)


class CachedPart(io.RawIOBase):
    """The bytes [start, stop) of a file of ``size`` bytes, block by block: from the cache, or from the server and into the cache.

    ``download`` opens bytes [start, stop) of the file.
    """

    def __init__(
        self, cache: BlockCache, dataset: str, name: str, start: int, stop: int, size: int, download: Callable[[int, int], BinaryIO]
    ) -> None:
        self.cache, self.dataset, self.name, self.size, self.download = cache, dataset, name, size, download
        self.position, self.stop = start, stop
        self._last = min(-(-stop // BLOCK) * BLOCK, size)
        self._block: tuple[int, bytes] = (-1, b"")
        self._source: tuple[int, BinaryIO] | None = None  # the block that comes next, and where it comes from

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """As of ``io.RawIOBase``."""
        number, offset = divmod(self.position, BLOCK)
        if self._block[0] != number and self.position < self.stop:
            self._block = (number, self._load(number))
        piece = self._block[1][offset : offset + min(len(buffer), self.stop - self.position)]
        buffer[: len(piece)] = piece
        self.position += len(piece)
        return len(piece)

    def _load(self, number: int) -> bytes:
        path = self.cache.path(self.dataset, self.name, number)
        if (found := self.cache.read(path)) is not None:
            return found
        if self._source is None or self._source[0] != number:
            self._leave()
            self._source = (number, self.download(number * BLOCK, self._last))
        source = self._source[1]
        data = source.read(min(BLOCK, self._last - number * BLOCK))
        self._source = (number + 1, source)
        self.cache.write(path, data)
        return data

    def _leave(self) -> None:
        if self._source is not None:
            self._source[1].close()
            self._source = None

    def close(self) -> None:
        """End the connection, if there is one."""
        self._leave()
        super().close()
