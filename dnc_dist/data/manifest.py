"""The manifest of a prepared data set: what it says, the files that it names, and whether they are all there."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import parse_json, read_bytes, shorten

MANIFEST, CLASSES, DUPLICATES, CONTACT_SHEET, INDEX = "manifest.json", "classes.json", "duplicates.json", "contact_sheet.png", "index"
STAGING = ".prepare"  # where a data set is collected before it is moved into the folder around
JOURNAL = "journal.jsonl"  # there: which shards are finished
FORMAT = 1
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
COLUMNS = ("label", "split", "query", "gallery", "shard", "offset", "size", "source")
COPY_AGAIN = "copy the data set again, or prepare it again with `dnc-dist data prepare … --force`"
# Nothing else is opened or removed by a name that a manifest gives.
_SHARD = re.compile(r"(train|validation|test)-[0-9]{6,9}\.tar")
_COLUMN = re.compile(r"[a-z][a-z0-9_]{0,39}")


@dataclass(frozen=True)
class Shard:
    """One tar file: its name in the folder, its split, the number of its rows and of its bytes."""

    name: str
    split: Split
    rows: int
    bytes: int


@dataclass(frozen=True)
class SplitCount:
    """Images and classes of a split."""

    rows: int
    classes: int


@dataclass(frozen=True)
class Unreadable:
    """An image that was left out, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Duplicates:
    """Images whose stored bytes are equal: groups of them, images in these, and groups in more than one class or split.

    ``examples``: the sources of some groups, those in two splits first, then those in two classes.
    """

    groups: int
    images: int
    across_classes: int
    across_splits: int
    examples: list[list[str]]


@dataclass(frozen=True)
class Manifest:
    """What a data set says about itself. ``duplicates`` is None if it was prepared before they were looked for."""

    format: int
    reader: str
    options: dict[str, str | int | float | None]
    notes: list[str]
    fingerprint: str
    content_hash: str
    num_rows: int
    splits: dict[Split, SplitCount]
    extra_columns: list[str]
    shards: list[Shard]
    unreadable: list[Unreadable]
    duplicates: Duplicates | None = None

    @property
    def layout_hash(self) -> str:
        """Hash of the images and of how they lie in shards: where it is equal, every byte of the shards is."""
        return hashlib.blake2b(repr((self.content_hash, self.shards)).encode(), digest_size=16).hexdigest()

    def to_json(self) -> str:
        """As it is written."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1)

    def files(self) -> set[str]:
        """All files of the data set, relative to its folder, the contact sheet among them."""
        columns = {f"{INDEX}/{name}.npy" for name in (*COLUMNS, *self.extra_columns)}
        return {MANIFEST, CLASSES, DUPLICATES, CONTACT_SHEET} | columns | {shard.name for shard in self.shards}


def is_prepared(folder: Path) -> bool:
    """Whether a folder is a prepared data set. A file of that name alone may be anybody's."""
    return (folder / MANIFEST).is_file() and (folder / INDEX).is_dir()


@dataclass(frozen=True)
class _Versioned:
    format: int = 0


def read_manifest(root: Path, file: str = MANIFEST) -> Manifest:
    """The manifest of a prepared data set.

    Raises:
        InputError: there is none, it belongs to another version of the format, or it is damaged.
    """
    path = root / file
    if not path.is_file():
        begun = (
            " (a `dnc-dist data prepare` into it is under way or was interrupted; the same command goes on)"
            if (root / STAGING).exists()
            else ""
        )
        raise InputError(
            f"{root} holds no prepared data set ({file} is missing){begun}; write one with `dnc-dist data prepare`, or give the "
            "folder of one (in a configuration: data.root)"
        )
    return parse_manifest(read_bytes(path), path)


def parse_manifest(data: bytes, source: str | Path) -> Manifest:
    """The manifest that these bytes are.

    Args:
        data: as they were written.
        source: where they are from, for the message.

    Raises:
        InputError: they belong to another version of the format, or are damaged.
    """
    if parse_json(data, _Versioned, source, COPY_AGAIN).format != FORMAT:
        raise InputError(f"{source} is no manifest of format {FORMAT}; prepare the data set again with `dnc-dist data prepare … --force`")
    manifest = parse_json(data, Manifest, source, COPY_AGAIN)
    if problem := _contradiction(manifest):
        raise InputError(f"{source} is damaged: {problem}; {COPY_AGAIN}")
    return manifest


def _contradiction(manifest: Manifest) -> str | None:
    """What cannot be, although every value has the right type."""
    for shard in manifest.shards:
        if not _SHARD.fullmatch(shard.name) or not shard.name.startswith(f"{shard.split}-"):
            return f"a {shard.split} shard is called {shorten(shard.name)}, not {shard.split}-NUMBER.tar"
        if shard.rows < 1 or shard.bytes < 1:
            return f"shard {shard.name} has {shorten(shard.rows)} rows in {shorten(shard.bytes)} bytes"
    if len({shard.name for shard in manifest.shards}) != len(manifest.shards):
        return "a shard is named twice"
    for name in manifest.extra_columns:
        if not _COLUMN.fullmatch(name) or name in COLUMNS:
            return f"an extra column is called {shorten(name)}"
    rows = {split: sum(shard.rows for shard in manifest.shards if shard.split == split) for split in SPLITS}
    if {split: count.rows for split, count in manifest.splits.items()} != {split: count for split, count in rows.items() if count}:
        return f"its shards hold {shorten(rows)} rows, its splits say otherwise"
    if sum(rows.values()) != manifest.num_rows or not manifest.num_rows:
        return f"its shards hold {shorten(sum(rows.values()))} rows, num_rows is {shorten(manifest.num_rows)}"
    return None


def shard_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the shards of a data set: each that is missing or has another size than the manifest says.

    A shard may be a link, as data sets under git-annex have them; it must lead to a regular file.
    """
    for shard in manifest.shards:
        path = folder / shard.name
        if not path.is_file():
            yield f"{path} is missing"
        elif (size := path.stat().st_size) != shard.bytes:
            yield f"{path} has {size:,} bytes instead of {shard.bytes:,}: it is truncated or was changed"
