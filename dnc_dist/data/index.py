"""The index of a prepared data set: memory-mapped columns, class names and the manifest, all in the order of the shards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dnc_dist.base.arrays import Array, read_column
from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import printable, read_json
from dnc_dist.base.web import folder_url, is_url
from dnc_dist.data.manifest import CLASSES, COLUMNS, COPY_AGAIN, INDEX, MANIFEST, SPLITS, Manifest, read_manifest, shard_problems
from dnc_dist.data.remote import AS_USUAL, Web
from dnc_dist.data.shard_files import LocalShards, RemoteShards, fetch_index

# Kinds of the columns' dtypes; all others are text.
_KINDS = {"label": "i", "split": "u", "query": "b", "gallery": "b", "shard": "i", "offset": "i", "size": "i"}
NO_LABEL = -1
"""The label of every row of a data set without classes: its list of class names is empty, and nothing is trained or measured on it."""
LISTS = "lists"  # an extra column: names, separated by spaces, of the lists that a row is in and a protocol measures one by one


@dataclass(frozen=True)
class RowView:
    """Some rows of the index with labels of their own: contiguous from 0, in the order of the rows; without classes all NO_LABEL.

    ``rows`` (n,) int64 ascending, ``labels`` (n,) int64 in 0..C-1, ``class_names`` of length C, ``query`` and ``gallery``
    (n,) bool, ``shards`` (n,) int32; ``lists``: name -> (n,) bool, the smaller list first; lists may overlap. Where a row stands in
    these arrays is its place.
    """

    name: str
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    class_names: list[str]
    query: NDArray[np.bool_]
    gallery: NDArray[np.bool_]
    shards: NDArray[np.int32]
    lists: dict[str, NDArray[np.bool_]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_classes(self) -> int:
        """Number of classes in this view."""
        return len(self.class_names)


@dataclass(frozen=True)
class DatasetIndex:
    """The columns of every row, mapped from disk: label, split, query, gallery, shard, offset, size, source (utf-8 bytes)."""

    root: Path
    manifest: Manifest
    class_names: list[str]
    columns: dict[str, NDArray[Any]] = field(repr=False)
    shards: LocalShards | RemoteShards = field(repr=False)
    """The tar files, to be read from front to back."""

    def __len__(self) -> int:
        return self.manifest.num_rows

    def __reduce__(self) -> tuple[Callable[[Path, RemoteShards | None], DatasetIndex], tuple[Path, RemoteShards | None]]:
        # Another process maps the columns itself instead of receiving a copy.
        return _open_folder, (self.root, self.shards if isinstance(self.shards, RemoteShards) else None)

    @property
    def is_remote(self) -> bool:
        """Whether the shards lie on a web server."""
        return isinstance(self.shards, RemoteShards)

    @property
    def content_hash(self) -> str:
        """Hash of every image, label, split and role."""
        return self.manifest.content_hash

    @property
    def labelled(self) -> bool:
        """Whether the rows have classes; without, they are a gallery to be embedded and searched."""
        return bool(self.class_names)

    def check_labelled(self) -> None:
        """Refuse a data set without classes where classes are needed.

        Raises:
            InputError: it has none.
        """
        if not self.labelled:
            raise InputError(
                f"{self.root} holds images without classes: they can be inspected, embedded and searched, but nothing can be trained or "
                "measured on them; let data.root name a data set whose images lie in class folders"
            )

    @property
    def splits(self) -> list[str]:
        """The splits that hold rows, in the order train, validation, test."""
        return [split for split in SPLITS if split in self.manifest.splits]

    @property
    def shard_paths(self) -> list[Path]:
        """The tar files of a data set in a folder, by shard number."""
        return [self.root / shard.name for shard in self.manifest.shards]

    def key(self, row: int) -> str:
        """The name under which messages report a row: its key in the tar and its source."""
        return f"{row_key(row)} ({text(self.columns['source'][row])})"

    def view(self, split: str) -> RowView:
        """The rows of one split.

        Raises:
            InputError: the data set has no such split.
        """
        if split not in self.splits:
            raise InputError(f"{self.root} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.select(split, np.flatnonzero(self.columns["split"] == SPLITS.index(split)))

    def select(self, name: str, rows: NDArray[np.int64]) -> RowView:
        """A view of the given ascending rows, with contiguous labels in the order of the global class names."""
        classes, labels = np.unique(np.asarray(self.columns["label"][rows]), return_inverse=True)
        if not self.labelled:
            classes, labels = classes[:0], np.full(len(rows), NO_LABEL)
        return RowView(
            name=name,
            rows=rows.astype(np.int64),
            labels=labels.astype(np.int64),
            class_names=[self.class_names[label] for label in classes],
            query=np.asarray(self.columns["query"][rows]),
            gallery=np.asarray(self.columns["gallery"][rows]),
            shards=np.asarray(self.columns["shard"][rows]),
            lists=_lists(self.columns[LISTS][rows]) if LISTS in self.columns else {},
        )


def _lists(column: NDArray[np.bytes_]) -> dict[str, NDArray[np.bool_]]:
    values, which = np.unique(column, return_inverse=True)
    names = [set(text(value).split()) for value in values]
    found = {name: np.array([name in some for some in names])[which] for name in sorted(set().union(*names))}
    return dict(sorted(found.items(), key=lambda item: int(item[1].sum())))


def text(value: bytes) -> str:
    """A value of a text column; what is no UTF-8, or would control a terminal, is shown with backslashes."""
    return printable(value.decode("utf-8", "backslashreplace"))


def row_key(row: int) -> str:
    """The key of a row in its tar shard."""
    return f"{row:09d}"


def hashed_share(names: list[str], share: float, *key: int | str) -> set[str]:
    """The ``round(share * n)`` names (at least 1, at most n - 1) whose seeded hash is smallest: it does not depend on their order."""
    count = min(max(round(share * len(names)), 1), len(names) - 1)
    return set(sorted(names, key=lambda name: hashlib.blake2b(repr((*key, name)).encode(), digest_size=16).digest())[:count])


def train_view(index: DatasetIndex, validation_classes: float = 0.0, seed: int = 0) -> RowView:
    """The rows to train on: the train split without the classes that ``validation_view`` holds out.

    Raises:
        InputError: ``validation_classes`` is set although the data set has a validation split.
    """
    return _train_part(index, validation_classes, seed, held_out=False)


def validation_view(index: DatasetIndex, validation_classes: float = 0.0, seed: int = 0) -> RowView | None:
    """The validation split, else whole training classes held out by a seeded hash, else None.

    Raises:
        InputError: ``validation_classes`` is set although the data set has a validation split.
    """
    if validation_classes > 0:
        return _train_part(index, validation_classes, seed, held_out=True)
    return index.view("validation") if "validation" in index.splits else None


def _train_part(index: DatasetIndex, validation_classes: float, seed: int, held_out: bool) -> RowView:
    index.check_labelled()
    train = index.view("train")
    if validation_classes == 0:
        return train
    if "validation" in index.splits:
        raise InputError(f"data.validation_classes={validation_classes}, but {index.root} has a validation split; set it to 0")
    chosen = hashed_share(train.class_names, validation_classes, seed, "validation")
    if len(chosen) < 2 or train.num_classes - len(chosen) < 2:
        raise InputError(
            f"data.validation_classes={validation_classes} of {train.num_classes} training classes leaves {len(chosen)} for validation "
            f"and {train.num_classes - len(chosen)} for training; both need at least 2"
        )
    mask = np.array([name in chosen for name in train.class_names])[train.labels]
    return index.select("validation" if held_out else "train", train.rows[mask if held_out else ~mask])


def save_index(root: Path, columns: dict[str, NDArray[Any]], class_names: list[str], manifest: Manifest) -> None:
    """Write the columns (one .npy each), class names and manifest of a data set that is being prepared."""
    (root / INDEX).mkdir()
    for name, column in columns.items():
        np.save(root / INDEX / f"{name}.npy", column)
    (root / CLASSES).write_text(json.dumps(class_names, ensure_ascii=False, indent=0), encoding="utf-8")
    (root / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def open_index(root: str | Path, web: Web = AS_USUAL) -> DatasetIndex:
    """Map a prepared data set, after comparing shards and columns with the manifest: no row lies outside of its shard.

    Args:
        root: the folder, or its address on a web server. Shards there are compared with the manifest when they are opened.
        web: how files on a server are read.

    Raises:
        InputError: no data set is there, or a file of it is missing, has another size or holds what cannot be; names the file.
        RunError: the server does not answer.
    """
    if isinstance(root, str) and is_url(root):
        url = folder_url(root)
        folder = fetch_index(url, web)
        remote = RemoteShards(url, read_manifest(folder), web)
        if remote.cache is not None:
            remote.cache.recount()
        try:
            return _open_folder(folder, remote)
        except InputError:
            # Perhaps it was copied while the data set there was being replaced: the next start copies it anew.
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return _open_folder(Path(os.path.realpath(root)), None)


def _open_folder(folder: Path, remote: RemoteShards | None) -> DatasetIndex:
    """The data set whose columns lie in a folder, and its shards beside them or on a server."""
    manifest = read_manifest(folder)
    if remote is None:
        for problem in shard_problems(folder, manifest):
            raise InputError(f"{problem}; {COPY_AGAIN}")
    class_names = read_json(folder / CLASSES, list[str], COPY_AGAIN)
    columns = {
        name: read_column(folder / INDEX / f"{name}.npy", Array(_KINDS.get(name, "S"), 1), COPY_AGAIN)
        for name in (*COLUMNS, *manifest.extra_columns)
    }
    for name, what in _column_problems(manifest, len(class_names), columns):
        raise InputError(f"{folder / INDEX / name}.npy is damaged: {what}; {COPY_AGAIN}")
    return DatasetIndex(folder, manifest, class_names, columns, remote or LocalShards(folder, manifest))


def _column_problems(manifest: Manifest, num_classes: int, columns: dict[str, NDArray[Any]]) -> Iterator[tuple[str, str]]:
    """The columns that do not fit the manifest, and why; a pass over whole arrays, a few ms for a million rows."""
    for name, column in columns.items():
        if len(column) != manifest.num_rows:
            yield name, f"it has {len(column):,} rows instead of {manifest.num_rows:,}"
            return  # what follows compares row by row
    counts = np.array([shard.rows for shard in manifest.shards])
    if not np.array_equal(columns["shard"], np.repeat(np.arange(len(counts)), counts)):
        yield "shard", "the rows do not lie in the shards as the manifest says"
        return
    if not np.array_equal(columns["split"], np.repeat([SPLITS.index(shard.split) for shard in manifest.shards], counts)):
        yield "split", "the rows are not in the splits that the manifest says"
    label, offset, size = (columns[name] for name in ("label", "offset", "size"))
    if num_classes == 0 and ((label != NO_LABEL).any() or manifest.splits.keys() != {"test"}):
        yield "label", f"{CLASSES} has no class, so that every label has to be {NO_LABEL}, in the split test"
    elif num_classes and (label.min() < 0 or label.max() >= num_classes):
        yield "label", f"a label is not one of the {num_classes:,} classes of {CLASSES}"
    room = np.array([shard.bytes for shard in manifest.shards])[columns["shard"]]
    if (size < 1).any() or (size > room).any():
        yield "size", "an image is empty or larger than its shard"
    if (offset < 0).any() or (offset > room - size).any():
        yield "offset", "an image lies outside of its shard"
