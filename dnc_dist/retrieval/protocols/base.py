"""What every protocol is: who asks, who is searched, and what is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dnc_dist.base import parts

SAMPLE_NEIGHBOURS = 10


class Queries(NamedTuple):
    """What each query found, in the order of the rows."""

    rows: np.ndarray  # (q,) int64 the queries
    first_hit: np.ndarray  # (q,) int64 rank, from 1, of the nearest row of its class, however far
    average_precision: np.ndarray  # (q,) float64, at R
    nearest: np.ndarray  # (q,) int64 the nearest row of any class
    distance: np.ndarray  # (q,) float32 to it, squared


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """The metrics of one evaluation and a sample of queries with their neighbours, to look at."""

    protocol: str
    metrics: dict[str, float]  # "recall@1", …, "map@r", "r_precision"
    num_queries: int
    num_gallery: int
    num_left_out: int  # queries without a gallery row of their class
    sample_queries: np.ndarray  # (s,) int64 rows
    sample_neighbours: np.ndarray  # (s, 10) int64 rows, nearest first; -1: the gallery has no more
    sample_distances: np.ndarray  # (s, 10) float32, squared
    trials: dict[str, np.ndarray] = field(default_factory=dict)  # metric -> (trials,) float64, of protocols that draw galleries
    queries: Queries | None = None  # of protocols in which every query asks once


@dataclass(frozen=True, eq=False)
class Columns:
    """What a protocol may know of the N rows of a view; a row is its place in it, 0 to N - 1."""

    view: str  # "train", "validation" or "test"
    labels: np.ndarray  # (N,) int64
    query: np.ndarray  # (N,) bool: roles that the data gives
    gallery: np.ndarray  # (N,) bool
    lists: Mapping[str, np.ndarray]  # name -> (N,) bool: lists that are measured one by one; they may overlap
    sources: Callable[[], Sequence[str]]  # -> (N,) what names an image everywhere

    def __len__(self) -> int:
        return len(self.labels)


def silent(done: int, total: int) -> None:
    """For searches whose progress nobody watches."""


class Protocol(ABC):
    """Base of retrieval protocols.

    ``measure`` calls ``tick`` again and again, with how many queries are done, and of how many: what shows progress also tells the
    watchdog that a long search is none that hangs. Whoever measures may set it; a protocol that stands for another hands it on.
    """

    class Options(parts.Options):
        """Default, range and meaning of every option."""

    def __init__(self, options: parts.Options) -> None:
        self.options = options
        self.tick: Callable[[int, int], None] = silent

    @property
    def name(self) -> str:
        """How results name the protocol."""
        return parts.name_of("protocol", type(self))

    @classmethod
    def suits(cls, columns: Columns) -> bool:
        """Whether `auto` takes this protocol for such data; at most one of all may say so."""
        return False

    def for_data(self, columns: Columns) -> Protocol:
        """The protocol that measures such data: itself, or whichever it stands for.

        Raises:
            InputError: it cannot be measured so.
        """
        return self

    @abstractmethod
    def measure(self, embeddings: Tensor, rows: Tensor, columns: Columns, recall_at: tuple[int, ...]) -> dict[str, RetrievalResult]:
        """Collective. The results of each list, by its name; of data without lists one, called "".

        Args:
            embeddings: (n, D) of this rank's rows; n may be 0.
            rows: (n,) int64 which rows of the view these are; a row on no rank could not be decoded and takes no part.
            columns: of all rows.
            recall_at: the k of recall@k.

        Raises:
            InputError: nothing can be retrieved.
            RunError: embeddings that are not finite.
        """

    def parameters(self, recall_at: tuple[int, ...]) -> dict[str, Any]:
        """What besides its name decides what it measures, as JSON has it: for the card of a result."""
        return {"recall_at": list(recall_at)} | self.options.model_dump(mode="json", exclude={"name"})

    def headline(self, lists: Sequence[str]) -> str:
        """Which of the lists stands for all."""
        return lists[0]

    def members(self, name: str, columns: Columns) -> np.ndarray:
        """(N,) bool: the rows of a list that ``measure`` names."""
        return np.ones(len(columns), bool)
