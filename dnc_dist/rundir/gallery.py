"""Queries with their nearest neighbours and pictures, as evaluation leaves them for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dnc_dist.base.arrays import Array, read_arrays
from dnc_dist.base.errors import InputError
from dnc_dist.base.files import replacing
from dnc_dist.rundir import GALLERY_FILE

_MOST_BYTES = 1 << 28
"""As pictures for a page, a gallery has a few million bytes."""
_ARRAYS = {
    "query_rows": Array("i", 1),
    "neighbour_rows": Array("i", 2),
    "query_labels": Array("i", 1),
    "neighbour_labels": Array("i", 2),
    "distances": Array("f", 2),
    "query_images": Array("u", 4),
    "neighbour_images": Array("u", 5),
}
_NAMES = {"name_labels": Array("i", 1), "names": Array("U", 1)}


@dataclass(frozen=True, eq=False)
class PictureGallery:
    """Pictures of q queries and of their n nearest neighbours, nearest first.

    Row and label are -1 where the gallery that was searched has no more.
    """

    query_rows: np.ndarray  # (q,) int64
    neighbour_rows: np.ndarray  # (q, n) int64
    query_labels: np.ndarray  # (q,) int64
    neighbour_labels: np.ndarray  # (q, n) int64
    distances: np.ndarray  # (q, n) float32
    class_names: Mapping[int, str]  # by label
    query_images: np.ndarray  # (q, side, side, 3) uint8
    neighbour_images: np.ndarray  # (q, n, side, side, 3) uint8

    def correct(self) -> np.ndarray:
        """(q, n) bool: neighbours of the query's class."""
        return self.neighbour_labels == self.query_labels[:, None]

    def name(self, label: int) -> str:
        """The name of a class; its number if it has none."""
        return str(self.class_names.get(label, label))


def save_gallery(run_dir: Path, gallery: PictureGallery) -> Path:
    """Write ``gallery.npz`` into a run directory: either the whole file is there or the one before."""
    path = run_dir / GALLERY_FILE
    labels = np.union1d(gallery.query_labels, gallery.neighbour_labels)
    labels = labels[labels >= 0]  # of a hundred thousand classes only those that are shown
    with replacing(path) as file:
        arrays: dict[str, Any] = {name: getattr(gallery, name) for name in _ARRAYS}
        np.savez_compressed(
            file, **arrays, name_labels=labels, names=np.array([gallery.name(int(label)) for label in labels], dtype=np.str_)
        )
    return path


def load_gallery(run_dir: Path) -> PictureGallery | None:
    """The gallery of a run directory; None if no evaluation has left one.

    Raises:
        InputError: the file is damaged.
    """
    path = run_dir / GALLERY_FILE
    if not path.exists():
        return None
    cure = "delete it, `dnc-dist report` works without"
    arrays = read_arrays(path, _ARRAYS | _NAMES, cure, most=_MOST_BYTES)
    labels, names = arrays.pop("name_labels"), arrays.pop("names")
    queries, neighbours = arrays["neighbour_rows"].shape
    side = arrays["query_images"].shape[1]
    expected = {
        **{name: (queries,) for name in ("query_rows", "query_labels")},
        **{name: (queries, neighbours) for name in ("neighbour_rows", "neighbour_labels", "distances")},
        "query_images": (queries, side, side, 3),
        "neighbour_images": (queries, neighbours, side, side, 3),
    }
    wrong = [name for name, shape in expected.items() if arrays[name].shape != shape]
    wrong += [name for name in ("query_images", "neighbour_images") if arrays[name].dtype != np.uint8]
    if wrong or not neighbours or not side or len(labels) != len(names):
        raise InputError(f"{path} is damaged: its arrays do not fit together{f' ({wrong[0]})' if wrong else ''}; {cure}")
    class_names = dict(zip(labels.tolist(), names.tolist(), strict=True))
    return PictureGallery(**arrays, class_names=class_names)
