"""Readers: one file for each kind of source. A reader lists samples for the shard writer."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import printable, read_bytes

TRAIN, VALIDATION, TEST = "train", "validation", "test"
NO_CLASS = ""
"""The class name of every image of a data set without classes: a gallery that is embedded and searched."""
_MOST_BYTES = 1 << 30  # of an image file


def plain(name: str | Path) -> str:
    """A name as text that can be printed and written: what is no UTF-8, or would control a terminal, is shown with backslashes."""
    return printable(os.fsencode(name).decode("utf-8", "backslashreplace"))


@dataclass(frozen=True, slots=True)
class Sample:
    """One image before it is written: where its bytes are and what is known about it."""

    class_name: str
    split: str
    source: str  # how reports name it: the path below the root, or the typeface
    path: Path | None = None  # the bytes are in this file ...
    data: bytes | None = None  # ... or here
    box: tuple[int, int, int, int] | None = None
    query: bool = True
    gallery: bool = True
    extra: tuple[tuple[str, str], ...] = ()

    def num_bytes(self) -> int:
        """Size of the encoded image as it lies in its source; 0 if it is not there."""
        return len(self.data) if self.data is not None else self.size_and_date()[0]

    def size_and_date(self) -> tuple[int, int]:
        """Size and date (ns) of the file; zeros if it is not there, which is told when it is read."""
        try:
            status = self.location().stat()
        except OSError:
            return 0, 0
        return status.st_size, status.st_mtime_ns

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            OSError: it cannot be read, or a link leads nowhere.
            ValueError: it is no regular file, or too large.
        """
        return self.data if self.data is not None else read_bytes(self.location(), _MOST_BYTES)

    def location(self) -> Path:
        """The file that holds the image."""
        assert self.path is not None
        return self.path


@dataclass(frozen=True)
class Reading:
    """What a reader found: the samples, the options that determined them, and sentences about rules it applied."""

    name: str
    samples: list[Sample]
    options: dict[str, str | int | float | None]
    notes: list[str] = field(default_factory=list)


class Reader(ABC):
    """Base of readers: ``dnc-dist data prepare`` calls ``read`` and writes what it lists."""

    class Options(parts.Options):
        """Default, range and meaning of every option."""

    source: ClassVar[str] = "folder of images"
    """What ``root`` has to be, in words; empty: the reader needs none."""

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def read(self, root: Path | None, *, seed: int, progress: Callable[[int, int], None] | None) -> Reading:
        """List the samples of a source.

        Args:
            root: where it is; None only for readers without a ``source``.
            seed: of every random choice.
            progress: may be called with (done, in all) by a reader that takes long.

        Raises:
            InputError: the source cannot be read.
        """


def read(
    name: str, root: Path | None = None, *, seed: int = 0, progress: Callable[[int, int], None] | None = None, **options: Any
) -> Reading:
    """What the reader of this name finds.

    Raises:
        InputError: no such reader, an option that it does not take, or a source that it cannot read.
    """
    reader: Reader = parts.build("reader", {**options, "name": name})
    if root is None and reader.source:
        raise InputError(f"data prepare {name} needs --root, the {reader.source}")
    return reader.read(root, seed=seed, progress=progress)
