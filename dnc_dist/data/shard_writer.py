"""Tars of images, and what the index says of each row."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np

from dnc_dist.data.duplicates import find_groups
from dnc_dist.data.index import row_key
from dnc_dist.data.journal import Finished, Journal
from dnc_dist.data.manifest import DUPLICATES, SPLITS, Duplicates, Shard, Split, Unreadable
from dnc_dist.data.readers import Sample

_HEADER = 512  # a ustar header; keys are short, so that it is always one block
_NAMED = 4  # images of a group of duplicates that are named


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member without date or owner; the offset of its data."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    offset = tar.offset + _HEADER
    tar.addfile(member, BytesIO(data))
    return offset


class ShardWriter:
    """Writes tars one after another, and collects what the index and the manifest say of them."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self.folder, self.journal = folder, journal
        self.shards: list[Shard] = []
        self.rows: list[tuple[Sample, int, int, int]] = []  # sample, shard, offset, size
        self.unreadable: list[Unreadable] = []
        self.hash = hashlib.blake2b(digest_size=16)
        self.digests = bytearray()  # 16 bytes a row

    def write_shard(self, split: Split, images: Iterator[tuple[Sample, bytes | str]], label_of: dict[str, int]) -> None:
        """One tar; none if no image of it could be read. What became of it is on the disk and in the journal."""
        path = self.folder / f"{split}-{sum(shard.split == split for shard in self.shards):06d}.tar"
        first, entries = len(self.rows), list[tuple[int, int] | str]()
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample, image in images:
                if isinstance(image, str):
                    self.unreadable.append(Unreadable(sample.source, image))
                    entries.append(image)
                    continue
                key = row_key(len(self.rows))
                offset = _add(tar, f"{key}.jpg", image)
                _add(tar, f"{key}.cls", str(label_of[sample.class_name]).encode())
                self._add_row(sample, split, image, offset)
                entries.append((offset, len(image)))
        empty = len(self.rows) == first
        if empty:
            path.unlink()
        else:
            self.shards.append(Shard(path.name, split, len(self.rows) - first, path.stat().st_size))
        self.journal.add(None if empty else path, entries)

    def take_shard(self, split: Split, samples: list[Sample], finished: Finished) -> None:
        """A shard that an interrupted writer finished, as if it were written now."""
        first = len(self.rows)
        path = self.folder / (finished.shard or "")
        with open(path if finished.shard else os.devnull, "rb") as file:
            for sample, entry in zip(samples, finished.images, strict=True):
                if isinstance(entry, str):
                    self.unreadable.append(Unreadable(sample.source, entry))
                    continue
                offset, size = entry
                file.seek(offset)
                self._add_row(sample, split, file.read(size), offset)
        if finished.shard:
            self.shards.append(Shard(path.name, split, len(self.rows) - first, path.stat().st_size))

    def _add_row(self, sample: Sample, split: Split, image: bytes, offset: int) -> None:
        self.rows.append((sample, len(self.shards), offset, len(image)))
        self.hash.update(repr((sample.class_name, split, sample.query, sample.gallery, len(image), *sample.extra)).encode())
        self.hash.update(image)
        self.digests += hashlib.blake2b(image, digest_size=16).digest()

    def columns(self, label_of: dict[str, int], extra: list[str]) -> dict[str, np.ndarray]:
        """The index columns, by name."""
        samples = [row[0] for row in self.rows]
        values = [dict(sample.extra) for sample in samples] if extra else []
        return {
            "label": np.array([label_of[sample.class_name] for sample in samples], np.int64),
            "split": np.array([SPLITS.index(sample.split) for sample in samples], np.uint8),
            "query": np.array([sample.query for sample in samples], np.bool_),
            "gallery": np.array([sample.gallery for sample in samples], np.bool_),
            "shard": np.array([row[1] for row in self.rows], np.int32),
            "offset": np.array([row[2] for row in self.rows], np.int64),
            "size": np.array([row[3] for row in self.rows], np.int64),
            "source": np.array([sample.source.encode() for sample in samples]),
            **{name: np.array([value.get(name, "").encode() for value in values]) for name in extra},
        }

    def duplicates(self, columns: dict[str, np.ndarray]) -> Duplicates:
        """Count the images that are stored more than once; if there are any, one file lists them all."""
        found = find_groups(bytes(self.digests), columns["label"], columns["split"])
        if len(found.across_splits):
            samples = [[self.rows[row][0] for row in found.members(group)] for group in range(len(found.across_splits))]
            listed = [[{"source": one.source, "class": one.class_name, "split": one.split} for one in group] for group in samples]
            (self.folder / DUPLICATES).write_text(json.dumps(listed, ensure_ascii=False, indent=0), encoding="utf-8")
        return Duplicates(
            groups=len(found.across_splits),
            images=len(found.rows),
            across_classes=int(found.across_classes.sum()),
            across_splits=int(found.across_splits.sum()),
            examples=[[self.rows[row][0].source for row in found.members(group)[:_NAMED]] for group in found.examples()],
        )
