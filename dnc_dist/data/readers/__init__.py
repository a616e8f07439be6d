"""Readers: one module per kind of source, each with a ``read`` function that lists samples for the shard writer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2"})


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
        """Size of the encoded image as it lies in its source."""
        return len(self.data) if self.data is not None else self.location().stat().st_size

    def read(self) -> bytes:
        """The encoded image."""
        return self.data if self.data is not None else self.location().read_bytes()

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
