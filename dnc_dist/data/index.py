"""The index of a prepared data set: memory-mapped columns, class names and the manifest, all in the order of the shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dnc_dist.errors import InputError

MANIFEST = "manifest.json"
FORMAT = 1
SPLITS = ("train", "validation", "test")
COLUMNS = ("label", "split", "query", "gallery", "shard", "offset", "size", "source")
LISTS = "lists"  # an extra column: names, separated by spaces, of the lists that a row is in and a protocol measures one by one


@dataclass(frozen=True)
class RowView:
    """Some rows of the index with labels of their own: contiguous from 0, in the order of the rows.

    ``rows`` (n,) int64 ascending, ``labels`` (n,) int64 in 0..C-1, ``class_names`` of length C, ``query`` and ``gallery``
    (n,) bool, ``shards`` (n,) int32; ``lists``: name -> (n,) bool, the smaller list first; lists may overlap.
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
    manifest: dict[str, Any]
    class_names: list[str]
    columns: dict[str, NDArray[Any]] = field(repr=False)

    def __len__(self) -> int:
        return int(self.manifest["num_rows"])

    def __reduce__(self) -> tuple[Callable[[Path], DatasetIndex], tuple[Path]]:
        # Another process maps the columns itself instead of receiving a copy.
        return open_index, (self.root,)

    @property
    def content_hash(self) -> str:
        """Hash of every image, label, split and role; ranks compare it at start."""
        return str(self.manifest["content_hash"])

    @property
    def splits(self) -> list[str]:
        """The splits that hold rows, in the order train, validation, test."""
        return [split for split in SPLITS if split in self.manifest["splits"]]

    @property
    def shard_paths(self) -> list[Path]:
        """The tar files, by shard number."""
        return [self.root / shard["name"] for shard in self.manifest["shards"]]

    def key(self, row: int) -> str:
        """The name under which messages report a row: its key in the tar and its source."""
        return f"{row_key(row)} ({self.columns['source'][row].decode()})"

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
    names = [set(value.decode().split()) for value in values]
    found = {name: np.array([name in some for some in names])[which] for name in sorted(set().union(*names))}
    return dict(sorted(found.items(), key=lambda item: int(item[1].sum())))


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


def save_index(root: Path, columns: dict[str, NDArray[Any]], class_names: list[str], manifest: dict[str, Any]) -> None:
    """Write the columns (one .npy each), class names and manifest of a data set that is being prepared."""
    (root / "index").mkdir()
    for name, column in columns.items():
        np.save(root / "index" / f"{name}.npy", column)
    (root / "classes.json").write_text(json.dumps(class_names, ensure_ascii=False, indent=0), encoding="utf-8")
    (root / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a prepared data set.

    Raises:
        InputError: there is none, or it belongs to another version of the format.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{root} holds no prepared data set ({MANIFEST} is missing); write one with `dnc-dist data prepare`, or set data.root"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); prepare the data set again with `dnc-dist data prepare … --force`") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is no manifest of format {FORMAT}; prepare the data set again with `dnc-dist data prepare … --force`")
    return manifest


def shard_problems(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the shards of a data set: each that is missing or has another size than the manifest says."""
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        if not path.is_file():
            yield f"{path} is missing"
        elif (size := path.stat().st_size) != shard["bytes"]:
            yield f"{path} has {size:,} bytes instead of {shard['bytes']:,}: it is truncated or was changed"


def open_index(root: str | Path) -> DatasetIndex:
    """Map a prepared data set, after comparing the size of every shard with the manifest.

    Raises:
        InputError: no data set is there, or a file of it is missing or has another size; names the file.
    """
    folder = Path(root).resolve()
    manifest = read_manifest(folder)
    cure = "copy the data set again, or prepare it again with `dnc-dist data prepare … --force`"
    for problem in shard_problems(folder, manifest):
        raise InputError(f"{problem}; {cure}")
    try:
        columns = {name: np.load(folder / "index" / f"{name}.npy", mmap_mode="r") for name in (*COLUMNS, *manifest["extra_columns"])}
        class_names = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: the index cannot be read ({error}); {cure}") from error
    short = [name for name, column in columns.items() if len(column) != manifest["num_rows"]]
    if short:
        raise InputError(f"{folder / 'index' / short[0]}.npy has {len(columns[short[0]])} rows instead of {manifest['num_rows']}; {cure}")
    return DatasetIndex(folder, manifest, class_names, columns)
