"""Which images are to be embedded: those of a folder, of a table, of a list of paths, or of a prepared data set."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import printable, read_bytes, read_table, read_text
from dnc_dist.data.images import SUFFIXES
from dnc_dist.data.index import NO_LABEL, open_index, row_key, text
from dnc_dist.data.manifest import SPLITS, is_prepared
from dnc_dist.data.readers import plain
from dnc_dist.data.readers.folder import SPLIT_NAMES, walk
from dnc_dist.data.rows import ShardReader

MOST_BYTES = 1 << 30
"""Of an image file."""
_LABELS = ("label", "class", "class_name")
_KINDS = (
    "a folder of images, a data set that `dnc-dist data prepare` wrote, a .csv file with a column path, "
    "a text file with a path on each line, or an image"
)


class Images(ABC):
    """Some images in an order. What is not known is "" or None.

    ``keys``: a name for each; ``paths``: the file, absolute; ``classes``: the name of the class; ``labels``: its number, where a data
    set gives one.
    """

    keys: list[str]
    paths: list[str | None]
    classes: list[str | None]
    labels: list[int | None]

    def __len__(self) -> int:
        return len(self.keys)

    @abstractmethod
    def readers(self, start: int, stop: int) -> list[Callable[[], bytes]]:
        """For each image of a range, what reads its bytes: in any process and thread. It raises OSError or InputError."""

    @abstractmethod
    def digest(self) -> str:
        """A number that changes with the list, and with what can be seen of the images without reading them."""


class _File:
    """Reads the bytes of a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self) -> bytes:
        return read_bytes(Path(self.path), MOST_BYTES)


class FileImages(Images):
    """Images in files of their own.

    ``files``: where each is, as the system knows it.

    Args:
        keys: a name for each.
        paths: where each is.
        classes: the class of each, None where it is not known.
    """

    def __init__(self, keys: Sequence[str], paths: Sequence[str | Path], classes: Sequence[str | None]) -> None:
        self.files = [os.path.abspath(path) for path in paths]
        self.keys, self.classes = list(keys), list(classes)
        self.paths: list[str | None] = [plain(path) for path in self.files]
        self.labels: list[int | None] = [None] * len(self.keys)

    def readers(self, start: int, stop: int) -> list[Callable[[], bytes]]:
        return [_File(path) for path in self.files[start:stop]]

    def digest(self) -> str:
        found = hashlib.blake2b(digest_size=16)
        for key, path, name in zip(self.keys, self.files, self.classes, strict=True):
            found.update(repr((key, path, name, *_size_and_date(path))).encode("utf-8", "backslashreplace"))
        return found.hexdigest()


def _size_and_date(path: str) -> tuple[int, int]:
    """Of a file; zeros for a link that leads nowhere, which is told when it is read."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


_reading = threading.Lock()


@cache
def _reader(root: Path) -> ShardReader:
    """The reader of this process; one thread at a time, as it closes files that others may be reading."""
    return ShardReader(open_index(root))


class _Row:
    """Reads the bytes of a row of a prepared data set."""

    def __init__(self, root: Path, row: int) -> None:
        self.root, self.row = root, row

    def __call__(self) -> bytes:
        with _reading:
            return _reader(self.root).read(self.row)


class PreparedImages(Images):
    """The rows of a prepared data set, of one split or of all.

    Raises:
        InputError: there is no such data set or split.
    """

    def __init__(self, root: Path, split: str | None = None) -> None:
        index = open_index(root)
        self._root, self._hash = index.root, index.content_hash
        self._rows = index.view(split).rows if split else np.arange(len(index))
        self.keys = [row_key(int(row)) for row in self._rows]
        labels = index.columns["label"][self._rows].tolist()
        self.labels = [None if label == NO_LABEL else label for label in labels]
        self.classes = [None if label == NO_LABEL else index.class_names[label] for label in labels]
        base = index.manifest.options.get("images") or index.manifest.options.get("root")
        sources = (text(source) for source in index.columns["source"][self._rows])
        # A reader without a folder, such as glyphs, has sources that are no files.
        self.paths = [os.path.join(base, source) if isinstance(base, str) else None for source in sources]

    def readers(self, start: int, stop: int) -> list[Callable[[], bytes]]:
        return [_Row(self._root, int(row)) for row in self._rows[start:stop]]

    def digest(self) -> str:
        return hashlib.blake2b(self._hash.encode() + self._rows.astype("<i8").tobytes(), digest_size=16).hexdigest()


def list_images(data: str | Path, split: str | None = None) -> Images:
    """The images that DATA means.

    Args:
        data: a folder of images (at any depth, in the order of their names; the class is the path of the folder that an image lies in,
            below that of its split), a prepared data set, a .csv file with the column path and maybe label or class, a text file with a
            path on each line, or an image. Paths in a file are relative to its folder.
        split: of a prepared data set; None: all of it.

    Raises:
        InputError: it is nothing of that, holds no image, or names files that are missing.
    """
    place = Path(data)
    if is_prepared(place):
        return PreparedImages(place, split)
    if split is not None:
        raise InputError(f"--split {split} needs a data set that `dnc-dist data prepare` wrote, with {', '.join(SPLITS)}; {data} is none")
    if place.is_dir():
        return _of_folder(place)
    if not place.is_file():
        raise InputError(f"{data} does not exist or is no regular file; give {_KINDS}")
    if place.suffix.lower() in SUFFIXES:
        return FileImages([plain(place.name)], [place], [None])
    if place.suffix.lower() == ".csv":
        return _of_table(place)
    return _of_list(place)


def list_queries(images: Sequence[str | Path]) -> FileImages:
    """The images that are given by their files or folders, one after the other, each with its path as it was given for a key.

    Raises:
        InputError: one does not exist, or a folder holds no image.
    """
    keys: list[str] = []
    paths: list[Path] = []
    for image in map(Path, images):
        if is_prepared(image):
            raise InputError(f"{image} is a prepared data set; give images, or folders of images")
        if image.is_dir():
            found = [image / name for name in _below(image)]
            if not found:
                raise InputError(_no_image(image))
        elif image.is_file():
            found = [image]
        else:
            raise InputError(f"{image} does not exist; give images, or folders of images")
        keys += [plain(path) for path in found]
        paths += found
    return FileImages(keys, paths, [None] * len(keys))


def _of_folder(folder: Path) -> FileImages:
    names = _below(folder)
    if not names:
        raise InputError(_no_image(folder))
    return FileImages([plain(name.as_posix()) for name in names], [folder / name for name in names], [_class_of(name) for name in names])


def _class_of(name: Path) -> str | None:
    """The folder of an image, below that of its split if there is one, also where only the test part of a data set is embedded."""
    folders = name.parent.parts
    if len(folders) > 1 and folders[0].lower() in SPLIT_NAMES:
        folders = folders[1:]
    return plain("/".join(folders)) or None


def _no_image(folder: Path) -> str:
    return f"{folder} holds no image; images are files that end in {', '.join(sorted(SUFFIXES & {'.jpg', '.jpeg', '.png', '.webp'}))}, …"


def _below(folder: Path) -> list[Path]:
    """The images in a folder and all folders below, relative to it, sorted; links are followed, into each real folder once.

    A prepared data set among them is none: its contact sheet is no photo.
    """
    found: list[Path] = []
    seen = {os.path.realpath(folder)}
    for place, folders, files in walk(folder):
        kept = []
        for name in sorted(folders):
            path = os.path.join(place, name)
            real = os.path.realpath(path)
            if not name.startswith(".") and real not in seen and not is_prepared(Path(path)):
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        names = (name for name in files if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES)
        found += [Path(place, name).relative_to(folder) for name in names]
    return sorted(found, key=lambda path: path.parts)


def _of_table(table: Path) -> FileImages:
    columns, rows = read_table(table)
    if "path" not in columns:
        raise InputError(f"{table} has no column path; it has {', '.join(map(printable, columns)) or 'none: the file is empty'}")
    label = next((name for name in _LABELS if name in columns), None)
    names, classes = [], []
    for line, row in rows:
        if not (path := (row["path"] or "").strip()):
            raise InputError(f"{table}, line {line}: path is empty")
        names.append(path)
        classes.append(printable((row[label] or "").strip()) or None if label else None)
    return _listed(table, names, classes)


def _of_list(file: Path) -> FileImages:
    names = [line for line in (line.strip() for line in _lines(file)) if line]
    return _listed(file, names, [None] * len(names))


def _lines(file: Path) -> Iterator[str]:
    try:
        content = read_text(file)
    except InputError as error:
        if not isinstance(error.__cause__, UnicodeDecodeError):
            raise
        content = "\0"
    if "\0" in content:
        raise InputError(f"{file} is neither an image nor a list of paths; give {_KINDS}")
    return io.StringIO(content, newline=None)


def _listed(file: Path, names: list[str], classes: list[str | None]) -> FileImages:
    if not names:
        raise InputError(f"{file} lists no image")
    paths = [file.parent / name for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} files that {file} lists are missing, first {plain(missing[0])}; "
            "paths are absolute, or relative to the folder of the list"
        )
    return FileImages([printable(name) for name in names], paths, classes)
