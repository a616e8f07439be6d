"""What every single query found, as a table for other programs."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from dnc_dist.base.errors import InputError
from dnc_dist.base.files import replacing
from dnc_dist.data.index import DatasetIndex, RowView, row_key, text
from dnc_dist.retrieval.protocols import Queries, RetrievalResult

COLUMNS = ("list", "key", "source", "class", "rank", "ap", "nearest_key", "nearest_source", "nearest_class", "similarity")
"""``list`` is empty for data without lists. ``rank`` is that of the first hit, from 1, however far it is; ``ap`` is the average precision
at R; ``similarity`` is the cosine to the nearest image."""


def check_place(path: Path) -> None:
    """Refuse a file that could not be written once the evaluation is through.

    Raises:
        InputError: it is no .csv file, or cannot be written there.
    """
    if path.suffix != ".csv":
        raise InputError(f"--per-query {path}: the table is written as CSV; give a name that ends in .csv")
    if not path.parent.is_dir():
        raise InputError(f"--per-query {path}: {path.parent} is no folder; make it, or name another one")
    if path.is_dir():
        raise InputError(f"--per-query {path} is a folder; give the name of a file")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"--per-query {path}: {path.parent} cannot be written to; change its permissions, or name another folder")


def write_queries(path: Path, index: DatasetIndex, view: RowView, results: Mapping[str, RetrievalResult]) -> None:
    """Write a line for every query of every list.

    Raises:
        InputError: the protocol does not look at single queries.
    """
    with replacing(path) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8", newline="")
        table = csv.writer(lines)
        table.writerow(COLUMNS)
        for name, result in results.items():
            if result.queries is None:
                raise InputError(
                    f"the protocol {result.protocol} draws several galleries, so that a query has no one answer; leave --per-query out, or "
                    "name another --protocol"
                )
            for row in _rows(result.queries, index, view):
                table.writerow((name, *row))
        lines.flush()
        lines.detach()


def _rows(found: Queries, index: DatasetIndex, view: RowView) -> Iterator[tuple[object, ...]]:
    source = index.columns["source"]
    # Of normalised embeddings.
    similarity = 1 - found.distance.astype(np.float64) / 2

    def told(at: int) -> tuple[str, str, str]:
        row = int(view.rows[at])
        return row_key(row), text(source[row]), view.class_names[view.labels[at]]

    for query, rank, precision, nearest, cosine in zip(
        found.rows, found.first_hit, found.average_precision, found.nearest, similarity, strict=True
    ):
        yield (*told(query), rank, f"{precision:.6f}", *told(nearest), f"{cosine:.6f}")
