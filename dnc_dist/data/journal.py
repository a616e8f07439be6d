"""What a writer of shards has finished, so that the same command goes on there after the writer was killed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dnc_dist.base.errors import InputError
from dnc_dist.base.files import replacing, sync
from dnc_dist.base.foreign import parse_json, read_lines
from dnc_dist.data.manifest import JOURNAL

_LONGEST_LINE = 1 << 28  # a shard with a million images fits


@dataclass(frozen=True)
class Finished:
    """A shard: its file (None: no image of it could be read), the file's digest, and per sample offset and size, or why it is left out."""

    shard: str | None
    digest: str
    images: list[tuple[int, int] | str]


@dataclass(frozen=True)
class _Head:
    fingerprint: str


class Journal:
    """The finished shards of a data set that is being written, one line each; of another data set none is taken over.

    A line is written when the shard is on the disk. What a shard holds is compared with its line before it is taken over.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder, self._path = folder, folder / JOURNAL
        self._head = _line(_Head(fingerprint))

    def take_over(self, sizes: Sequence[int]) -> list[Finished]:
        """What an earlier writer of this very data set finished; everything else that it left is removed.

        Args:
            sizes: number of samples of each shard.
        """
        found = []
        for entry, size in zip(self._entries(), sizes, strict=False):
            if len(entry.images) != size or not self._is_whole(entry):
                break
            found.append(entry)
        names = {entry.shard for entry in found}
        for path in self._folder.glob("*.tar"):
            if path.name not in names:
                path.unlink()
        with replacing(self._path) as file:
            file.write(b"".join([self._head, *map(_line, found)]))
        return found

    def add(self, path: Path | None, images: list[tuple[int, int] | str]) -> None:
        """Note a finished shard: its file (None: it holds nothing and is not kept), and what became of each sample."""
        if path is not None:
            sync(path)
            sync(path.parent)
        entry = Finished(path.name if path else None, _digest(path) if path else "", images)
        with self._path.open("ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())

    def _entries(self) -> Iterator[Finished]:
        """The lines that mean something, up to the first that does not."""
        if not self._path.is_file():
            return
        lines = read_lines(self._path, _LONGEST_LINE)
        if next(lines, b"") != self._head:
            return
        try:
            for line in lines:
                yield parse_json(line, Finished, self._path)
        except InputError:  # a line that a crash damaged: the shard is written again
            return

    def _is_whole(self, entry: Finished) -> bool:
        if entry.shard is None:
            return all(isinstance(image, str) for image in entry.images)
        path = self._folder / entry.shard
        return path.name == entry.shard and path.is_file() and _digest(path) == entry.digest


def _line(value: Finished | _Head) -> bytes:
    return json.dumps(asdict(value)).encode() + b"\n"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
