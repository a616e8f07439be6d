"""Why a run's model errs, as its last evaluation leaves it for the report: a bounded file, however many queries there were."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dnc_dist.base.arrays import Array, read_arrays
from dnc_dist.base.errors import InputError
from dnc_dist.base.files import replacing
from dnc_dist.rundir import DIAGNOSIS_FILE

_MOST_BYTES = 1 << 27
"""With all its pictures a diagnosis has ten or twenty million bytes."""
_LARGEST = 1e9
"""Of numbers that are shown: distances and masks are small, and no cluster has more images."""
_CURE = "delete it, `dnc-dist report` works without"


class _Column(NamedTuple):
    """What an array has to be: the kinds of its dtype, its dimensions by letter, and what its whole numbers count (None: nothing)."""

    kinds: str
    dims: str
    below: str | None = None
    least: int = 0


MOST = {"p": 2048, "i": 128, "m": 512, "l": 64, "c": 64, "e": 16, "h": 64, "b": 256, "s": 8192, "k": 256, "D": 1 << 16, "t": 64, "n": 4096,
        "j": 128}  # fmt: skip
"""The largest size of each dimension; a file with more is none of ours.

Pictures p of i pixels a side, misses m, entries l of a list, confused pairs c, examples e, hubs h, bars b, sampled queries s,
learners k, embedding D, pictures t of a cluster, points n of the map, j pixels a side on its pictures.
"""
_COLUMNS = {
    "counts": _Column("i", "2"),
    "rank_counts": _Column("i", "7"),
    "distance_edges": _Column("f", "b+"),
    "distance_counts": _Column("i", "2 b"),
    "twins": _Column("i", "1"),
    "rows": _Column("i", "p"),
    "labels": _Column("i", "p"),
    "names": _Column("U", "p"),
    "sources": _Column("U", "p"),
    "images": _Column("u", "p i i 3"),
    "queries": _Column("i", "m", "p"),
    "nearest": _Column("i", "m", "p"),
    "distances": _Column("f", "m"),
    "own": _Column("i", "m", "p", -1),
    "own_distances": _Column("f", "m"),
    "first_hits": _Column("i", "m"),
    "agreeing": _Column("i", "m 2"),
    "alone": _Column("b", "m k"),
    "worst": _Column("i", "l1", "m"),
    "alike": _Column("i", "l2", "m"),
    "mislabelled": _Column("i", "l3", "m"),
    "pair_counts": _Column("i", "c 2"),
    "pair_queries": _Column("i", "c 2"),
    "pair_examples": _Column("i", "c e", "m", -1),
    "hubs": _Column("i", "h", "p"),
    "hub_counts": _Column("i", "h 3"),
    "hub_examples": _Column("i", "h e", "m", -1),
    "sampled_right": _Column("b", "s"),
    "sampled_alone": _Column("b", "s k"),
    "sampled_learner": _Column("i", "s", "k"),
    "missed_alone": _Column("b", "s2 k"),
    "masks": _Column("f", "k D"),
    "clusters": _Column("f", "k 4"),
    "montage": _Column("i", "k t", "p", -1),
    "map_points": _Column("f", "n 2"),
    "map_labels": _Column("i", "n"),
    "map_names": _Column("U", "n"),
    "map_right": _Column("b", "n"),
    "map_images": _Column("u", "n j j 3"),
    "map_variance": _Column("f", "2"),
    "map_rows": _Column("i", "n", least=-1),
    "map_step": _Column("i", "1", least=-1),
}
_LATER = ("map_rows", "map_step")
"""Arrays that files of earlier versions do not have."""


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What stands in ``diagnosis.npz``. Without queries that have one answer each, or without learners, those arrays are empty.

    Images are shown once each: p *pictures*, which everything else names by their place. So are the m *misses*: queries whose nearest
    image is of another class.
    """

    counts: np.ndarray  # (2,) int64: queries, and how many of them are misses
    rank_counts: np.ndarray  # (7,) int64: queries whose first hit has rank 1, 2, 3-5, 6-10, 11-100, more; or was not listed
    distance_edges: np.ndarray  # (b + 1,) float32: borders of the bars of ``distance_counts``
    distance_counts: np.ndarray  # (2, b) int64: queries by the distance to the nearest image, where that is right and where it is wrong
    twins: np.ndarray  # (1,) int64: misses at a distance of practically 0
    # Pictures.
    rows: np.ndarray  # (p,) int64 of the index of the data set
    labels: np.ndarray  # (p,) int64
    names: np.ndarray  # (p,) str, of the class
    sources: np.ndarray  # (p,) str: the file that it came from
    images: np.ndarray  # (p, side, side, 3) uint8
    # Misses.
    queries: np.ndarray  # (m,) int64 picture
    nearest: np.ndarray  # (m,) int64 picture, of another class
    distances: np.ndarray  # (m,) float32 to it
    own: np.ndarray  # (m,) int64 the nearest picture of the query's class; -1: the gallery has none
    own_distances: np.ndarray  # (m,) float32 to it
    first_hits: np.ndarray  # (m,) int64 its rank; 0: beyond those that were listed
    agreeing: np.ndarray  # (m, 2) int64: how many of its nearest so-many are of the class of the very nearest
    alone: np.ndarray  # (m, k) bool: learners in whose subspace the nearest image is right
    # Lists of misses, the most remarkable first.
    worst: np.ndarray  # (l,) int64 miss: those whose first hit comes last
    alike: np.ndarray  # (l,) int64 miss: nearer to an image of another class than right ones are to theirs
    mislabelled: np.ndarray  # (l,) int64 miss: in the midst of another class, far from its own
    pair_counts: np.ndarray  # (c, 2) int64: queries of class a that found class b, and the other way round
    pair_queries: np.ndarray  # (c, 2) int64: all queries of a, and of b
    pair_examples: np.ndarray  # (c, e) int64 miss, the first of a to b; -1: no more
    hubs: np.ndarray  # (h,) int64 picture
    hub_counts: np.ndarray  # (h, 3) int64: queries of other classes that it is nearest to, those classes, queries of its own class
    hub_examples: np.ndarray  # (h, e) int64 miss; -1: no more
    # Samples, drawn at random: of all queries, and (missed) of all misses.
    sampled_right: np.ndarray  # (s,) bool: right in the whole embedding
    sampled_alone: np.ndarray  # (s, k) bool: right in the subspace of a learner
    sampled_learner: np.ndarray  # (s,) int64 the learner whose training images lie nearest
    missed_alone: np.ndarray  # (s, k) bool
    # What division did.
    masks: np.ndarray  # (k, D) float32, at least 0
    clusters: np.ndarray  # (k, 4) float32 of the training set: images, classes, classes of which most lie here, mean share of a class
    montage: np.ndarray  # (k, t) int64 picture: training images of each cluster; -1: no more
    # The map.
    map_points: np.ndarray  # (n, 2) float32
    map_labels: np.ndarray  # (n,) int64
    map_names: np.ndarray  # (n,) str
    map_right: np.ndarray  # (n,) bool: its nearest image is of its class
    map_images: np.ndarray  # (n, side, side, 3) uint8
    map_variance: np.ndarray  # (2,) float32: the share of all variance along each axis
    map_rows: np.ndarray  # (n,) int64 of the index of the data set; -1: unknown, the file is of an earlier version
    map_step: np.ndarray  # (1,) int64: of the evaluation; -1: unknown

    @property
    def num_learners(self) -> int:
        """Learners whose subspaces were looked at; 0: the training set was never divided."""
        return len(self.masks)


def save_diagnosis(run_dir: Path, found: Diagnosis) -> Path:
    """Write ``diagnosis.npz`` into a run directory: either the whole file is there or the one before."""
    path = run_dir / DIAGNOSIS_FILE
    arrays: dict[str, Any] = {column.name: getattr(found, column.name) for column in fields(found)}
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)
    return path


def load_diagnosis(run_dir: Path) -> Diagnosis | None:
    """What a run's last evaluation has left; None if it left nothing, as those of earlier versions do.

    Raises:
        InputError: the file is damaged.
    """
    path = run_dir / DIAGNOSIS_FILE
    if not path.exists():
        return None
    kinds = {name: Array(column.kinds, len(column.dims.split()), name not in _LATER) for name, column in _COLUMNS.items()}
    arrays = read_arrays(path, kinds, _CURE, most=_MOST_BYTES)
    arrays.setdefault("map_rows", np.full(len(arrays["map_points"]), -1))
    arrays.setdefault("map_step", np.array([-1]))
    for name, problem in _problems(arrays):
        raise InputError(f"{path} is damaged: {name} {problem}; {_CURE}")
    return Diagnosis(**arrays)


def _problems(arrays: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """Arrays that contradict each other, and how."""
    found = []
    sizes: dict[str, int] = {}
    for name, column in _COLUMNS.items():
        array = arrays[name]
        for letter, size in zip(column.dims.split(), array.shape, strict=True):
            if letter.isdecimal():
                expected = int(letter)
            else:
                of = letter.rstrip("+")
                size -= letter.endswith("+")
                expected = sizes.setdefault(of, size)
                if not (of in "ijDb") <= size <= MOST[of[0]]:
                    found.append((name, f"has the shape {array.shape}"))
            if size != expected:
                found.append((name, f"has the shape {array.shape}, which does not fit the others"))
        if column.kinds == "u" and array.dtype != np.uint8:
            found.append((name, f"is an array of {array.dtype}"))
        elif array.dtype.kind == "i" and array.size:
            most = sizes.get(column.below, 0) if column.below else 1 << 62
            if array.min() < column.least or array.max() >= most:
                found.append((name, "holds a number that cannot be"))
        elif array.dtype.kind == "f" and not (np.abs(array) <= _LARGEST).all():  # false for NaN
            found.append((name, "holds a number that cannot be"))
    if not found and not (np.diff(arrays["distance_edges"]) > 0).all():
        found.append(("distance_edges", "does not ascend"))
    return found
