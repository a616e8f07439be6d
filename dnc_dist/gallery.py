"""Queries with their nearest neighbours and pictures, as evaluation leaves them for the report."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dnc_dist.errors import InputError

GALLERY_FILE = "gallery.npz"
_ARRAYS = ("query_rows", "neighbour_rows", "query_labels", "neighbour_labels", "distances", "query_images", "neighbour_images")


@dataclass(frozen=True, eq=False)
class Gallery:
    """q queries and their n nearest neighbours, nearest first; row and label -1 where the gallery has no more."""

    query_rows: np.ndarray  # (q,) int64
    neighbour_rows: np.ndarray  # (q, n) int64
    query_labels: np.ndarray  # (q,) int64
    neighbour_labels: np.ndarray  # (q, n) int64
    distances: np.ndarray  # (q, n) float32
    class_names: Sequence[str]  # indexed by label
    query_images: np.ndarray  # (q, side, side, 3) uint8
    neighbour_images: np.ndarray  # (q, n, side, side, 3) uint8

    def correct(self) -> np.ndarray:
        """(q, n) bool: neighbours of the query's class."""
        return self.neighbour_labels == self.query_labels[:, None]

    def name(self, label: int) -> str:
        """The name of a class; its number if it has none."""
        return str(self.class_names[label]) if 0 <= label < len(self.class_names) else str(label)


def save_gallery(run_dir: Path, gallery: Gallery) -> Path:
    """Write ``gallery.npz`` into a run directory: either the whole file is there or the one before."""
    path = run_dir / GALLERY_FILE
    part = path.with_name(path.name + ".part")
    labels = np.union1d(gallery.query_labels, gallery.neighbour_labels)
    labels = labels[labels >= 0]  # of a hundred thousand classes only those that are shown
    with part.open("wb") as file:
        arrays: dict[str, Any] = {name: getattr(gallery, name) for name in _ARRAYS}
        np.savez_compressed(
            file, **arrays, name_labels=labels, names=np.array([gallery.name(int(label)) for label in labels], dtype=np.str_)
        )
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    return path


def load_gallery(run_dir: Path) -> Gallery | None:
    """The gallery of a run directory; None if no evaluation has left one.

    Raises:
        InputError: the file is damaged.
    """
    path = run_dir / GALLERY_FILE
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in _ARRAYS}
            labels, names = file["name_labels"], file["names"]
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it, `dnc-dist report` works without") from error
    class_names = [str(label) for label in range(int(labels.max(initial=-1)) + 1)]
    for label, name in zip(labels.tolist(), names.tolist(), strict=True):
        class_names[label] = name
    return Gallery(**arrays, class_names=class_names)
