"""Reader of a CSV file: path, label, split and optional columns; an open-metric-learning table is read as it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import read_table, shorten
from dnc_dist.data.readers import TEST, VALIDATION, Reader, Reading, Sample, plain
from dnc_dist.data.readers.folder import SPLIT_NAMES

_LABEL = ("label", "class", "class_name")
_ROLES = {"query": ("is_query", "query"), "gallery": ("is_gallery", "gallery")}
_EXTRA = ("category", "sequence", "camera", "super_class")
_BOX = ("x_1", "y_1", "x_2", "y_2")
_TRUE, _FALSE = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no")


def _role(row: dict[str, str], columns: tuple[str, ...], default: bool, where: str) -> bool:
    """The flag of a role: given, or (column missing or empty) the default."""
    for column in columns:
        value = (row.get(column) or "").strip().lower()
        if value in _TRUE:
            return True
        if value in _FALSE:
            return False
        if value not in ("", "nan", "none"):
            raise InputError(f"{where}: {column}={shorten(value)} is no flag; write true or false, or leave it empty")
    return default


def _box(row: dict[str, str], where: str) -> tuple[int, int, int, int] | None:
    """The box (left, top, right, bottom), None where its columns are missing or empty."""
    values = [(row.get(column) or "").strip() for column in _BOX]
    empty = [value in ("", "nan") for value in values]
    if all(empty):
        return None
    if any(empty):
        raise InputError(f"{where}: the box {', '.join(_BOX)} = {shorten(', '.join(values))} has {4 - sum(empty)} of four numbers")
    try:
        left, top, right, bottom = (round(float(value)) for value in values)
    except (ValueError, OverflowError) as error:  # OverflowError: inf
        raise InputError(f"{where}: the box {', '.join(_BOX)} = {shorten(', '.join(values))} is not four numbers") from error
    return left, top, right, bottom


class CsvReader(Reader):
    """A table with the columns path, label, split; one of open-metric-learning as it is."""

    class Options(parts.Options):
        images: Path | None = None
        """Where relative paths begin; null: the folder of the table."""

    source = "CSV file"

    def read(self, root: Path | None, *, seed: int, progress: Callable[[int, int], None] | None) -> Reading:
        assert root is not None
        return _read(root, self.options.images)


def _read(table: Path, images: Path | None) -> Reading:
    """List the images of a table.

    Columns: ``path`` (absolute, or relative to ``images``, else to the table's folder), ``label`` or ``class``, ``split`` (train,
    validation, test, query, gallery), and where present is_query, is_gallery, a box x_1, y_1, x_2, y_2 to cut out, category,
    sequence, camera, super_class.
    Without a test split the validation split is the test split: open-metric-learning evaluates on what it calls validation.

    Raises:
        InputError: the table or an image is missing, a column is missing, or a value means nothing; names the line.
    """
    if not table.is_file():
        raise InputError(f"--root {table} is no file; give the CSV file that lists the images")
    columns, rows = read_table(table)
    label_column = next((name for name in _LABEL if name in columns), None)
    missing = [name for name, there in (("path", "path" in columns), ("label", label_column), ("split", "split" in columns)) if not there]
    if missing:
        there = shorten(", ".join(columns)) if columns else "no header: the file is empty"
        raise InputError(f"{table} has no column {', '.join(missing)}; it has {there}")
    assert label_column is not None
    base = images or table.parent
    samples = [_sample(row, label_column, base, f"{table}, line {line}") for line, row in rows]
    notes = []
    absent = [sample.source for sample in samples if not sample.location().is_file()]
    if absent:
        raise InputError(
            f"{len(absent)} of {len(samples)} images that {table} lists are missing, first {base / absent[0]}; set --images to their folder"
        )
    splits = {sample.split for sample in samples}
    if VALIDATION in splits and TEST not in splits:
        samples = [_as_test(sample) if sample.split == VALIDATION else sample for sample in samples]
        notes.append("the table has no test split: its validation split is the test split here")
    used = {"path", label_column, "split", *_ROLES["query"], *_ROLES["gallery"], *_BOX, *_EXTRA}
    if unused := [column for column in columns if column and column not in used]:
        notes.append(f"columns not used: {', '.join(unused)}")
    return Reading("csv", samples, {"root": plain(os.path.realpath(table)), "images": plain(os.path.realpath(base))}, notes)


def _sample(row: dict[str, str], label_column: str, base: Path, where: str) -> Sample:
    path, label, given = ((row.get(name) or "").strip() for name in ("path", label_column, "split"))
    if not path or not label:
        raise InputError(f"{where}: path and {label_column} must not be empty")
    if given.lower() not in SPLIT_NAMES:
        raise InputError(f"{where}: split={shorten(given)}; allowed are {', '.join(SPLIT_NAMES)}")
    split, query, gallery = SPLIT_NAMES[given.lower()]
    return Sample(
        class_name=label,
        split=split,
        source=path,
        path=base / path,
        box=_box(row, where),
        query=_role(row, _ROLES["query"], query, where),
        gallery=_role(row, _ROLES["gallery"], gallery, where),
        extra=tuple((name, (row[name] or "").strip()) for name in _EXTRA if name in row),
    )


def _as_test(sample: Sample) -> Sample:
    return Sample(sample.class_name, TEST, sample.source, sample.path, sample.data, sample.box, sample.query, sample.gallery, sample.extra)
