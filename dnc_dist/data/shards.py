"""The shard writer: samples to WebDataset tars, index and manifest, the same bytes on every run."""

from __future__ import annotations

import errno
import hashlib
import math
import os
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import astuple
from itertools import islice
from pathlib import Path
from typing import TypeVar

from dnc_dist.base.errors import InputError, RunError, of_the_machine
from dnc_dist.base.rng import numpy_generator
from dnc_dist.data.convert import convert
from dnc_dist.data.images import AS_THEY_ARE, Form
from dnc_dist.data.index import NO_LABEL, save_index
from dnc_dist.data.journal import Journal
from dnc_dist.data.manifest import (
    FORMAT,
    MANIFEST,
    SPLITS,
    Duplicates,
    Manifest,
    Split,
    SplitCount,
    read_manifest,
)
from dnc_dist.data.place import check_free, claimed, commit
from dnc_dist.data.readers import NO_CLASS, Reading, Sample
from dnc_dist.data.shard_writer import ShardWriter

T = TypeVar("T")
SHARD_BYTES = 256 * 2**20
MIN_SHARDS = 64
_STORED = 2  # the way images are stored; a data set that was prepared in another way is another one


def check_usable(samples: list[Sample], origin: str) -> None:
    """Refuse what nothing can be learned from, unless it has no classes at all: that is a gallery.

    Raises:
        InputError: no image at all, none to train on, a single training class, no training class with two images, or images without a
            class beside some that have one.
    """
    if not samples:
        raise InputError(f"{origin} holds no image; expected split/class/*.jpg, class/*.jpg or a CSV that lists images")
    if without := sum(sample.class_name == NO_CLASS for sample in samples):
        if without < len(samples):
            raise InputError(f"{origin} has {without:,} of {len(samples):,} images without a class; give all a class, or none")
        return
    counts: dict[str, int] = {}
    for sample in samples:
        if sample.split == "train":
            counts[sample.class_name] = counts.get(sample.class_name, 0) + 1
    if not counts:
        raise InputError(f"{origin} has no training image; name one split `train`")
    if len(counts) < 2:
        raise InputError(f"{origin} has one training class ({next(iter(counts))}); at least 2 are needed to have negatives")
    if max(counts.values()) < 2:
        raise InputError(
            f"{origin} has one image in each of its {len(counts)} training classes; at least one needs 2, to have a positive pair"
        )


def shard_of_class(class_bytes: list[int], least: int = MIN_SHARDS) -> list[int]:
    """The shard of each class (C,): contiguous, about equal in bytes, ``max(total / 256 MB, least)`` of them but at most C."""
    num_classes, total = len(class_bytes), max(sum(class_bytes), 1)
    count = min(max(math.ceil(total / SHARD_BYTES), least), num_classes)
    shards: list[int] = []
    before, previous = 0, -1
    for position, size in enumerate(class_bytes):
        wanted = (before + size // 2) * count // total
        # Never skip a shard, and leave at least one class for each of those to come.
        previous = max(min(wanted, previous + 1), count - num_classes + position)
        shards.append(previous)
        before += size
    return shards


def _in_shard_order(samples: list[Sample], seed: int, least: int) -> list[tuple[Split, list[Sample]]]:
    """Groups (split, samples of one shard): classes in seeded random order, a class's samples together; without classes, images."""
    groups = []
    for split in SPLITS:
        classes: dict[str, list[Sample]] = {}
        for sample in samples:
            if sample.split == split:
                classes.setdefault(sample.class_name or sample.source, []).append(sample)
        names = sorted(classes)
        ordered = [names[i] for i in numpy_generator(seed, "class order", split).permutation(len(names))]
        shards = shard_of_class([sum(sample.num_bytes() for sample in classes[name]) for name in ordered], least)
        for shard in range(shards[-1] + 1 if shards else 0):
            groups.append((split, [sample for name, at in zip(ordered, shards, strict=True) if at == shard for sample in classes[name]]))
    return groups


def fingerprint(reading: Reading, seed: int, form: Form, least: int = MIN_SHARDS) -> str:
    """A hash of everything that determines the shards: options and the list of samples with their sizes and dates."""
    options: tuple[object, ...] = (FORMAT, _STORED, reading.name, sorted(reading.options.items()), seed, astuple(form))
    if least != MIN_SHARDS:  # data sets from before one could choose stay the same
        options = (*options, least)
    digest = hashlib.blake2b(repr(options).encode(), digest_size=16)
    for sample in reading.samples:
        state = sample.data if sample.data is not None else sample.size_and_date()
        digest.update(
            repr((sample.class_name, sample.split, sample.source, sample.box, sample.query, sample.gallery, sample.extra, state)).encode()
        )
    return digest.hexdigest()


def write_shards(
    reading: Reading,
    out: Path,
    *,
    seed: int = 0,
    form: Form = AS_THEY_ARE,
    processes: int = 1,
    shards: int = MIN_SHARDS,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], object] | None = None,
) -> bool:
    """Write shards, index and manifest into ``out``, which holds them all or none of them at any moment.

    What was interrupted goes on after its last finished shard, to the same bytes.

    Args:
        reading: what a reader found.
        seed: order of the classes.
        form: of images that cannot stay as they are.
        processes: how many convert images; the bytes do not depend on it.
        shards: at least so many for each split, if it has as many classes.
        force: replace the prepared data set that is there.
        progress: called with (images done, images in all) of those that are left to do.
        say: called with a sentence about what is there already.

    Returns:
        Whether anything was written; False: this very data set is already there.

    Raises:
        InputError: nothing to train on, ``out`` holds something else or is being written to, or it cannot be written.
    """
    out = Path(os.path.realpath(out))
    check_usable(reading.samples, reading.name)
    mark = fingerprint(reading, seed, form, shards)
    if not force and (out / MANIFEST).is_file() and read_manifest(out).fingerprint == mark:
        return False
    try:
        with claimed(out) as folder:
            check_free(out, force)
            _write(reading, folder, mark, seed, form, processes, shards, progress or _silent, say or _silent)
            commit(out, force)
    except OSError as error:  # of writing: what cannot be read is told of otherwise
        where = f" ({error.filename})" if error.filename else ""
        cure = "free some space there" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "see that you may write there"
        kind = RunError if of_the_machine(error) else InputError
        raise kind(f"--out {out} cannot be written: {error.strerror or error}{where}; {cure}, or use another --out") from error
    return True


def _counted(images: Generator[T, None, None], total: int, progress: Callable[[int, int], object]) -> Generator[T, None, None]:
    with closing(images):
        for done, image in enumerate(images, start=1):
            progress(done, total)
            yield image


def _silent(*told: object) -> None:
    """Tell nobody."""


def _write(
    reading: Reading,
    folder: Path,
    mark: str,
    seed: int,
    form: Form,
    processes: int,
    shards: int,
    progress: Callable[[int, int], object],
    say: Callable[[str], object],
) -> None:
    """Write the whole data set into a folder, where an interrupted writer may have begun."""
    writer = ShardWriter(folder, Journal(folder, mark))
    names = sorted({sample.class_name for sample in reading.samples} - {NO_CLASS})
    label_of = {name: label for label, name in enumerate(names)} | {NO_CLASS: NO_LABEL}
    groups = _in_shard_order(reading.samples, seed, shards)
    finished = writer.journal.take_over([len(group) for _, group in groups])
    for (split, group), entry in zip(groups, finished, strict=False):
        writer.take_shard(split, group, entry)
    left = groups[len(finished) :]
    samples = [sample for _, group in left for sample in group]
    if finished:
        say(f"{len(reading.samples) - len(samples):,} of {len(reading.samples):,} images were written before; going on with the others")
    with closing(_counted(convert(samples, form, processes), len(samples), progress)) as images:
        for split, group in left:
            writer.write_shard(split, islice(images, len(group)), label_of)
    check_usable([row[0] for row in writer.rows], f"{reading.name}, without its {len(writer.unreadable)} unreadable images,")
    extra = sorted({name for sample in reading.samples for name, _ in sample.extra})
    columns = writer.columns(label_of, extra)
    save_index(folder, columns, names, _manifest(writer, reading, mark, extra, writer.duplicates(columns)))


def _manifest(writer: ShardWriter, reading: Reading, mark: str, extra: list[str], duplicates: Duplicates) -> Manifest:
    splits = {}
    for split in SPLITS:
        names = [row[0].class_name for row in writer.rows if row[0].split == split]
        if names:
            splits[split] = SplitCount(len(names), len(set(names) - {NO_CLASS}))
    return Manifest(
        format=FORMAT,
        reader=reading.name,
        options=reading.options,
        notes=reading.notes,
        fingerprint=mark,
        content_hash=writer.hash.hexdigest(),
        num_rows=len(writer.rows),
        splits=splits,
        extra_columns=extra,
        shards=writer.shards,
        unreadable=writer.unreadable,
        duplicates=duplicates,
    )
