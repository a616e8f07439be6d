"""Where the shards of a data set lie, and how a run of their bytes is opened: files of a folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO, Protocol

from dnc_dist.data.manifest import Manifest


class Shards(Protocol):
    """The shards of a data set, by their numbers. Safe to pickle."""

    def name(self, shard: int) -> str:
        """Path or address, for messages."""
        ...

    def open(self, shard: int, start: int, stop: int) -> BinaryIO:
        """The bytes [start, stop) of a shard, to be read from front to back.

        Raises:
            InputError: the shard is not there, or is another one.
            RunError: its source does not answer.
        """
        ...


class LocalShards:
    """Shards in a folder."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.paths = [root / shard.name for shard in manifest.shards]

    def name(self, shard: int) -> str:
        """The path."""
        return str(self.paths[shard])

    def open(self, shard: int, start: int, stop: int) -> BinaryIO:
        """The bytes [start, stop) of a shard; fewer if the file ends before."""
        return io.BufferedReader(_FilePart(self.paths[shard], start, stop), 1 << 18)


class _FilePart(io.RawIOBase):
    """The bytes [start, stop) of a file."""

    def __init__(self, path: Path, start: int, stop: int) -> None:
        self._file = io.FileIO(path)
        self._file.seek(start)
        self._left = stop - start

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """As of ``io.RawIOBase``."""
        count = self._file.readinto(buffer[: self._left]) if self._left else 0
        self._left -= count
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
