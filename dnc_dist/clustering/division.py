"""A division says which learner trains on which row of the training view; it is a value: made once, saved, compared, never changed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnc_dist.base.arrays import Array, check_arrays, read_arrays
from dnc_dist.base.errors import InputError
from dnc_dist.base.exact import contingency
from dnc_dist.base.files import replacing
from dnc_dist.base.foreign import shorten
from dnc_dist.clustering.repair import class_sizes

_SHAPES = {"learner_of": Array("i", 1), "centroids": Array("f", 2), "sizes": Array("i", 1)}
_SHAPES |= dict.fromkeys(("num_learners", "epoch", "left_out", "rejoined", "trials"), Array("i", 0))
_SHAPES["groups"] = Array("i", 2, required=False)  # divisions that were saved before there were groups lack them
_SHAPES |= dict.fromkeys(("objective", "matched_share", "nmi_to_previous"), Array("f", 0))
_NO_GROUPS = np.empty((0, 0), np.int32)
MIN_CLASSES = 2
"""A learner needs so many classes with at least two rows each: below, it has no pairs to learn from."""


@dataclass(frozen=True, eq=False)
class Division:
    """Rows to learners, and how that came about."""

    learner_of: np.ndarray  # (N,) int16, by place in the view; -1: left out until the next division
    num_learners: int
    centroids: np.ndarray  # (k, F) float32, means of the rows; (k, 0) if no features were needed
    epoch: int
    sizes: np.ndarray  # (k,) int64, rows that are not left out
    left_out: int  # rows without a second row of their class in the cluster
    rejoined: int = 0  # rows moved because their cluster was not trainable
    trials: int = 0  # k-means runs, those of the 2-means splits included
    objective: float = 0.0  # sum of squared distances of all rows to the centroid of their cluster
    matched_share: float = 1.0  # share of rows that keep their learner, before the split; 1 without a previous division
    nmi_to_previous: float = 1.0  # between the previous division and this one before the split; 1 without a previous division
    groups: np.ndarray = field(default_factory=lambda: _NO_GROUPS)  # (G, n) int32, classes that share a batch, -1: no more; see ``groups``

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, for a checkpoint."""
        state = dataclasses.asdict(self)
        return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in state.items()}

    @classmethod
    def from_state(cls, state: Any, source: str | Path = "division") -> Division:
        """The division that gave this ``state_dict``.

        Args:
            state: what was read.
            source: where it is from, for the message.

        Raises:
            InputError: it is no division.
        """
        if not isinstance(state, dict) or state.keys() | {"groups"} != _SHAPES.keys():
            raise InputError(f"{source} is damaged: it holds no division")
        arrays = {}
        for name, value in state.items():
            if not isinstance(value, Tensor | int | float):
                raise InputError(f"{source} is damaged: {name} is {shorten(value)}")
            try:
                arrays[name] = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
            except TypeError as error:  # a dtype that numpy does not have
                raise InputError(f"{source} is damaged: {name}: {error}") from error
        return cls._of_arrays(arrays, source)

    @classmethod
    def _of_arrays(cls, arrays: dict[str, np.ndarray], source: str | Path) -> Division:
        check_arrays(arrays, _SHAPES, source)
        values: dict[str, Any] = {name: value if value.ndim else value.item() for name, value in arrays.items()}
        made = cls(**values)
        k, learners = made.num_learners, made.learner_of
        if k < 1 or len(made.sizes) != k or len(made.centroids) != k or (len(learners) and not -1 <= learners.min() <= learners.max() < k):
            raise InputError(f"{source} is damaged: its division contradicts itself")
        return made

    def fits(self, labels: np.ndarray) -> bool:
        """Whether it can be one of a view with these labels (N,), from 0 on: as many rows; groups of all classes that are trained, each
        within one learner, who has these classes whole."""
        if len(self.learner_of) != len(labels):
            return False
        if not self.groups.size:
            return True
        trained, there = self.learner_of >= 0, self.groups >= 0
        if not np.array_equal(np.unique(self.groups[there]), np.unique(labels[trained])) or not there[:, 0].all():
            return False
        learner_of_class = np.full(int(labels.max()) + 1, -1)
        learner_of_class[labels[trained]] = self.learner_of[trained]
        of_group = learner_of_class[self.groups]
        whole = learner_of_class[labels[trained]] == self.learner_of[trained]
        return bool(whole.all() and ((of_group == of_group[:, :1]) | ~there).all())

    def save(self, path: str | Path) -> None:
        """Write an .npz file that is either complete or not there."""
        with replacing(Path(path)) as file:
            np.savez(file, **dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Division:
        """Read what ``save`` wrote.

        Raises:
            InputError: the file is missing, unreadable or no division.
        """
        return cls._of_arrays(read_arrays(Path(path), _SHAPES, "give a file from the divisions/ folder of a run"), path)


def match(previous: np.ndarray, current: np.ndarray, num_learners: int) -> np.ndarray:
    """Renumber clusters so that as many rows as possible keep their number (Hungarian method on the overlap).

    The published implementation applies the permutation in the inverse direction.

    Args:
        previous: (N,) numbers below ``num_learners``; rows with -1 have no say.
        current: (N,) numbers to be changed; -1 stays.

    Returns:
        (N,) of the type of ``current``.
    """
    # Here, as it takes a fifth of a second to import, and the first division has none to match.
    from scipy.optimize import linear_sum_assignment

    old, new = linear_sum_assignment(contingency(previous, current, num_learners, num_learners), maximize=True)
    renamed = np.full(num_learners + 1, -1, current.dtype)
    renamed[new] = old
    return renamed[current]


def whole(labels: np.ndarray, *, epoch: int = 0) -> Division:
    """One learner for everything; only rows whose class has no other row are left out."""
    return make_division(np.zeros(len(labels), np.int64), labels, 1, np.empty((1, 0), np.float32), epoch)


def check_num_learners(labels: np.ndarray, num_learners: int) -> None:
    """Refuse more learners than the classes can feed, before anything is computed.

    Raises:
        InputError: fewer than two classes with two rows per learner.
    """
    classes = int((np.unique(labels, return_counts=True)[1] >= 2).sum())
    if classes < MIN_CLASSES:
        raise InputError(
            f"the training set has {classes} classes with at least 2 images; at least {MIN_CLASSES} are needed: "
            f"take a data set (data.root) with more classes or more images per class"
        )
    if classes < MIN_CLASSES * num_learners:
        raise InputError(
            f"division.num_learners={num_learners} is too many for {classes} classes with at least 2 training images; every learner "
            f"needs {MIN_CLASSES} such classes: set division.num_learners to at most {classes // MIN_CLASSES}"
        )


def make_division(cluster: np.ndarray, labels: np.ndarray, k: int, centroids: np.ndarray, epoch: int) -> Division:
    """The division of (N,) clusters below k; rows without a partner of their class in the cluster are left out."""
    learner_of = np.where(class_sizes(cluster, labels).of_row >= 2, cluster, -1).astype(np.int16)
    sizes = np.bincount(learner_of[learner_of >= 0], minlength=k).astype(np.int64)
    return Division(learner_of, k, centroids, epoch, sizes, left_out=int((learner_of < 0).sum()))
