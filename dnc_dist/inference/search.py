"""Search: for each query image the nearest images of an index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dnc_dist.base.errors import InputError
from dnc_dist.base.progress import Progress
from dnc_dist.data.listing import list_queries
from dnc_dist.embedder import Embedder
from dnc_dist.inference.index import VectorIndex


@dataclass(frozen=True)
class Hit:
    """One image that was found: its place from 1, its row in the index, what is known of it, and the cosine with the query."""

    rank: int
    row: int
    key: str
    path: str | None
    class_name: str | None
    similarity: float


@dataclass(frozen=True)
class Answer:
    """A query (its path as it was given, and absolute) and its hits, nearest first."""

    query: str
    path: str
    hits: list[Hit]


@dataclass(frozen=True)
class Found:
    """The answers in the order of the queries, and the queries that could not be read (path, why)."""

    answers: list[Answer]
    unreadable: list[tuple[str, str]]


def search(model: Embedder, index: VectorIndex, images: Sequence[Path], top: int) -> Found:
    """The ``top`` nearest images of the index for each query.

    Args:
        model: the one that the index was made with.
        index: what is searched.
        images: files, and folders whose images at any depth are queries.
        top: hits for each.

    Raises:
        InputError: the model is another one, or no query can be read.
    """
    index.check(model)
    queries = list_queries(images)
    with Progress(len(queries) > model.batch_size).phase("embedding", len(queries), "img") as phase:
        found = model.embed_bytes(queries.readers(0, len(queries)), phase.update)
    unreadable = [(queries.keys[at], why) for at, why in found.failed.items()]
    if len(unreadable) == len(queries):
        raise InputError("no query can be read: " + "; ".join(f"{key} ({why})" for key, why in unreadable[:3]))
    readable = [at for at in range(len(queries)) if at not in found.failed]
    hits = index.search(found.vectors[readable], min(top, len(index)))
    answers = []
    for at, rows, similarity in zip(readable, hits.rows.tolist(), hits.similarity.tolist(), strict=True):
        answers.append(Answer(queries.keys[at], queries.paths[at] or "", list(_hits(index, rows, similarity))))
    return Found(answers, unreadable)


def _hits(index: VectorIndex, rows: list[int], similarity: list[float]) -> Iterator[Hit]:
    table = index.keys.table
    for rank, (row, cosine) in enumerate(zip(rows, similarity, strict=True), start=1):
        if row >= 0:
            yield Hit(rank, row, table.keys[row], table.paths[row], table.classes[row], cosine)
