"""What a prepared data set holds, as text and as a contact sheet."""

from __future__ import annotations

from contextlib import closing

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dnc_dist.base.fonts import font
from dnc_dist.base.foreign import printable
from dnc_dist.base.rng import numpy_generator
from dnc_dist.data.images import DECODE_ERRORS, decode
from dnc_dist.data.index import DatasetIndex, RowView
from dnc_dist.data.manifest import DUPLICATES, MANIFEST, Duplicates
from dnc_dist.data.rows import ShardReader

_CLASSES, _IMAGES, _CELL, _LABEL = 12, 10, 72, 14


def _size(num_bytes: int) -> str:
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def describe(index: DatasetIndex) -> str:
    """A table of splits, and what else one should know before training: shards, unreadable images, classes in two splits."""
    lines = [f"{'split':<12}{'images':>10}{'classes':>10}{'images/class: min':>19}{'median':>8}{'max':>6}{'shards':>8}{'size':>10}"]
    shards = index.manifest.shards
    views = {split: index.view(split) for split in index.splits}
    for split, view in views.items():
        counts = np.bincount(view.labels) if index.labelled else np.zeros(1, np.int64)
        mine = [shard for shard in shards if shard.split == split]
        lines.append(
            f"{split:<12}{len(view):>10,}{view.num_classes:>10,}{counts.min():>19,}{np.median(counts):>8g}{counts.max():>6,}"
            f"{len(mine):>8}{_size(sum(shard.bytes for shard in mine)):>10}"
        )
        if not (view.query.all() and view.gallery.all()):
            lines.append(f"{'':<12}queries {view.query.sum():,}, gallery {view.gallery.sum():,}")
        for name, inside in view.lists.items():
            lines.append(f"{f'  {name}':<12}{inside.sum():>10,}{len(np.unique(view.labels[inside])):>10,}")
    if not index.labelled:
        lines.append("no classes: a gallery to be embedded and searched; nothing can be trained or measured on it")
    lines.append(f"content {index.content_hash}, read from {index.manifest.reader}")
    if index.labelled and "test" in views and views["test"].num_classes == 1:
        lines.append("test has one class: whatever is found is right there, also by a network that learned nothing")
    if {"train", "test"} <= views.keys() and (shared := set(views["train"].class_names) & set(views["test"].class_names)):
        lines.append(f"{len(shared):,} classes are in train and in test: retrieval here is not of unseen classes")
    if index.manifest.duplicates and index.manifest.duplicates.groups:
        lines.append(f"{told_duplicates(index.manifest.duplicates)} (all in {index.root / DUPLICATES}):")
        lines += [f"  {' = '.join(group)}" for group in index.manifest.duplicates.examples]
    unreadable = index.manifest.unreadable
    if unreadable:
        lines.append(f"{len(unreadable):,} images could not be read and are left out (all in {index.root / MANIFEST}):")
        lines += [f"  {entry.source}: {entry.reason}" for entry in unreadable[:5]]
    return "\n".join(map(printable, lines))


def told_duplicates(found: Duplicates) -> str:
    """How many images are stored more than once, in words."""
    parts = [f"{found.groups:,} groups of equal images ({found.images:,} images)"]
    parts += [f"{found.across_splits:,} groups lie in more than one split"] if found.across_splits else []
    parts += [f"{found.across_classes:,} in more than one class"] if found.across_classes else []
    return ", ".join(parts)


def contact_sheet(index: DatasetIndex, seed: int = 0) -> Image.Image:
    """Some classes of each split, chosen by the seed: a class a row, its name above up to ten of its images; or images without classes."""
    height = _CELL + _LABEL
    lines = [line for split in index.splits for line in _lines(index.view(split), seed)]
    sheet = Image.new("RGB", (_IMAGES * _CELL, len(lines) * height), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.font = font(10)
    with closing(ShardReader(index)) as reader:
        for number, (title, rows) in enumerate(lines):
            draw.text((3, number * height + 1), title, fill=(60, 60, 60))
            _draw_line(sheet, index, rows, reader, number * height + _LABEL)
    return sheet


def _lines(view: RowView, seed: int) -> list[tuple[str, NDArray[np.int64]]]:
    """Title and rows of each line of a view."""
    generator = numpy_generator(seed, "contact sheet", view.name)
    if not view.num_classes:
        rows = np.sort(generator.permutation(view.rows)[: _CLASSES * _IMAGES])
        return [(f"{view.name}, no classes", rows[first : first + _IMAGES]) for first in range(0, len(rows), _IMAGES)]
    labels = np.sort(generator.permutation(view.num_classes)[:_CLASSES])
    return [(f"{view.name} / {view.class_names[label]}", view.rows[view.labels == label][:_IMAGES]) for label in labels]


def _draw_line(sheet: Image.Image, index: DatasetIndex, rows: NDArray[np.int64], reader: ShardReader, top: int) -> None:
    for column, row in enumerate(rows):
        data = reader.read(int(row))
        try:
            image = decode(data)
        except DECODE_ERRORS as error:
            raise OSError(f"{index.key(int(row))} can no longer be decoded: {error}") from error
        image.thumbnail((_CELL - 4, _CELL - 4))
        sheet.paste(image, (column * _CELL + (_CELL - image.width) // 2, top + (_CELL - image.height) // 2))
