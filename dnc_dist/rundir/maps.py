"""Where the sampled test images lie in the embedding, evaluation by evaluation: a small file for each, at most 32 of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from dnc_dist.base.arrays import Array, read_arrays
from dnc_dist.base.errors import InputError
from dnc_dist.base.files import replacing
from dnc_dist.rundir import MAPS

MOST_POINTS = 4096
MOST_KEPT = 32
"""Files of a run; however many evaluations it has, these are spread over all of them."""
_MOST_BYTES = 1 << 20
"""A map of 1,000 points has 16,000."""
_LARGEST = 1e9
_NAME = re.compile(r"step-([0-9]{8,15})\.npz")
_ARRAYS = {"rows": Array("i", 1), "points": Array("f", 2), "variance": Array("f", 1)}


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """Some images in the plane in which their embeddings differ most."""

    rows: np.ndarray  # (n,) int64 of the index of the data set, ascending
    points: np.ndarray  # (n, 2) float32; the mean of all is 0
    variance: np.ndarray  # (2,) float32: the share of all variance along each axis


def save_map(run_dir: Path, step: int, found: EmbeddingMap) -> Path:
    """Write the map of the evaluation at a step, or replace it. Those of later steps belong to a past that the run went back behind:
    they go. Of more than 32 the one goes whose neighbours are nearest to each other.
    """
    folder = run_dir / MAPS
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.npz"
    arrays: dict[str, Any] = {column.name: getattr(found, column.name) for column in fields(found)}
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)
    kept = _files(run_dir)
    steps = sorted(kept)
    while steps[-1] > step:
        kept[steps.pop()].unlink()
    while len(steps) > MOST_KEPT:
        gaps = np.array(steps[2:]) - np.array(steps[:-2])
        kept[steps.pop(int(gaps.argmin()) + 1)].unlink()
    return path


def load_maps(run_dir: Path, steps: Iterable[int], most: int, *, before: int) -> tuple[dict[int, EmbeddingMap], list[str]]:
    """Some maps by step, about equally far from each other, and what is wrong with those among them that are damaged.

    Args:
        run_dir: the run directory.
        steps: of the evaluations whose maps may be read.
        most: maps that are read.
        before: the step of a map that follows all of them.
    """
    kept = _files(run_dir)
    found, damaged = dict[int, EmbeddingMap](), list[str]()
    for step in spread(sorted(kept.keys() & set(steps)), most, before=before):
        try:
            found[step] = _read(kept[step])
        except InputError as error:
            damaged.append(str(error))
    return found, damaged


def spread(steps: list[int], most: int, *, before: int) -> list[int]:
    """At most so many of the ascending ``steps``, which divide the way from the first of them to ``before`` about equally."""
    if len(steps) <= most:
        return steps
    every = np.array(steps)
    wanted = np.linspace(every[0], before, most + 1)[:-1]
    chosen: list[int] = np.unique(every[np.abs(every[:, None] - wanted).argmin(0)]).tolist()
    return chosen


def _files(run_dir: Path) -> dict[int, Path]:
    """The files of maps, by step."""
    folder = run_dir / MAPS
    named = ((_NAME.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ()))
    return {int(match[1]): path for match, path in named if match is not None}


def _read(path: Path) -> EmbeddingMap:
    """A map.

    Raises:
        InputError: the file is damaged.
    """
    found = EmbeddingMap(**read_arrays(path, _ARRAYS, most=_MOST_BYTES))
    count = len(found.rows)
    fit = count <= MOST_POINTS and found.points.shape == (count, 2) and found.variance.shape == (2,)
    if not fit or (np.diff(found.rows) <= 0).any() or not all((np.abs(of) <= _LARGEST).all() for of in (found.points, found.variance)):
        raise InputError(f"{path} is damaged: its arrays do not fit together")
    return found
