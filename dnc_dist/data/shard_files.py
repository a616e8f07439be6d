"""Where the shards of a data set lie, and how a run of their bytes is opened: in a folder, or on a web server."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import BinaryIO, Protocol

from dnc_dist.base.arrays import MOST_UNPACKED
from dnc_dist.base.files import replacing
from dnc_dist.base.foreign import MOST_BYTES
from dnc_dist.data.block_cache import BlockCache, CachedPart
from dnc_dist.data.manifest import CLASSES, COLUMNS, INDEX, MANIFEST, Manifest, parse_manifest
from dnc_dist.data.remote import Web, fetch, open_url, pieces


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


class RemoteShards:
    """Shards on a server, maybe with a cache of what was read of them.

    ``url`` of the folder, with a slash at its end; ``web`` how they are read.
    """

    def __init__(self, url: str, manifest: Manifest, web: Web) -> None:
        self.url, self.web = url, web
        self.shards = [(shard.name, shard.bytes) for shard in manifest.shards]
        self.key = manifest.layout_hash
        self.cache = BlockCache(web.cache / "shards", web.cache_bytes) if web.cache is not None else None

    def name(self, shard: int) -> str:
        """The address."""
        return self.url + self.shards[shard][0]

    def open(self, shard: int, start: int, stop: int) -> BinaryIO:
        """The bytes [start, stop) of a shard; errors as of ``Download``."""
        name, size = self.shards[shard]

        def download(first: int, last: int) -> BinaryIO:
            return open_url(self.url + name, first, last, size=size, patience=self.web.patience)

        if self.cache is None:
            return download(start, stop)
        return io.BufferedReader(CachedPart(self.cache, self.key, name, start, stop, size, download), 1 << 18)


def fetch_index(url: str, web: Web) -> Path:
    """The folder with this machine's copy of what a data set on a server says about itself: manifest, class names, columns.

    Only the manifest is asked for every time; the others are copied once for each manifest, for all processes of the machine.

    Raises:
        InputError: there is no data set, or its manifest is damaged.
        RunError: the server does not answer.
    """
    home = web.cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dnc-dist"
    data = b"".join(pieces(url + MANIFEST, MOST_BYTES, web.patience))
    manifest = parse_manifest(data, url + MANIFEST)
    # All of the manifest: the same images may lie in other shards, or have other sources.
    folder = home.absolute() / "index" / hashlib.blake2b(url.encode() + data, digest_size=16).hexdigest()
    for name in (CLASSES, *(f"{INDEX}/{column}.npy" for column in (*COLUMNS, *manifest.extra_columns))):
        if not (folder / name).exists():
            fetch(url + name, folder / name, MOST_BYTES if name == CLASSES else MOST_UNPACKED, web.patience)
    with replacing(folder / MANIFEST) as file:
        file.write(data)
    return folder
