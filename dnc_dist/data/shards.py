"""The shard writer: samples to WebDataset tars, index and manifest, the same bytes on every run."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np

from dnc_dist.base.errors import InputError
from dnc_dist.base.rng import numpy_generator
from dnc_dist.data.duplicates import find_groups
from dnc_dist.data.images import DECODE_ERRORS, normalise, why_not
from dnc_dist.data.index import NO_LABEL, row_key, save_index
from dnc_dist.data.manifest import (
    DUPLICATES,
    FORMAT,
    MANIFEST,
    SPLITS,
    Duplicates,
    Manifest,
    Shard,
    Split,
    SplitCount,
    Unreadable,
    read_manifest,
)
from dnc_dist.data.place import check_free, claimed, commit
from dnc_dist.data.readers import NO_CLASS, Reading, Sample, plain

SHARD_BYTES = 256 * 2**20
MIN_SHARDS = 64
_HEADER = 512  # a ustar header; keys are short, so that it is always one block
_NAMED = 4  # images of a group of duplicates that are named
_STORED = 2  # the way images are stored; a data set that was prepared in another way is another one
_CHUNK, _MAX_FLYING = 16, 16  # images converted at a time by a thread, and chunks in memory


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


def shard_of_class(class_bytes: list[int]) -> list[int]:
    """The shard of each class (C,): contiguous, about equal in bytes, ``max(total / 256 MB, 64)`` of them but at most C."""
    num_classes, total = len(class_bytes), max(sum(class_bytes), 1)
    count = min(max(math.ceil(total / SHARD_BYTES), MIN_SHARDS), num_classes)
    shards: list[int] = []
    before, previous = 0, -1
    for position, size in enumerate(class_bytes):
        wanted = (before + size // 2) * count // total
        # Never skip a shard, and leave at least one class for each of those to come.
        previous = max(min(wanted, previous + 1), count - num_classes + position)
        shards.append(previous)
        before += size
    return shards


def _in_shard_order(samples: list[Sample], seed: int) -> list[tuple[Split, list[Sample]]]:
    """Groups (split, samples of one shard): classes in seeded random order, a class's samples together; without classes, images."""
    groups = []
    for split in SPLITS:
        classes: dict[str, list[Sample]] = {}
        for sample in samples:
            if sample.split == split:
                classes.setdefault(sample.class_name or sample.source, []).append(sample)
        names = sorted(classes)
        ordered = [names[i] for i in numpy_generator(seed, "class order", split).permutation(len(names))]
        shards = shard_of_class([sum(sample.num_bytes() for sample in classes[name]) for name in ordered])
        for shard in range(shards[-1] + 1 if shards else 0):
            groups.append((split, [sample for name, at in zip(ordered, shards, strict=True) if at == shard for sample in classes[name]]))
    return groups


def fingerprint(reading: Reading, seed: int, max_side: int | None) -> str:
    """A hash of everything that determines the shards: options and the list of samples with their sizes and dates."""
    options = (FORMAT, _STORED, reading.name, sorted(reading.options.items()), seed, max_side)
    digest = hashlib.blake2b(repr(options).encode(), digest_size=16)
    for sample in reading.samples:
        state = sample.data if sample.data is not None else sample.size_and_date()
        digest.update(
            repr((sample.class_name, sample.split, sample.source, sample.box, sample.query, sample.gallery, sample.extra, state)).encode()
        )
    return digest.hexdigest()


def _converted(samples: list[Sample], max_side: int | None) -> list[tuple[Sample, bytes | str]]:
    """Each image as stored, or why it cannot be read."""
    results: list[tuple[Sample, bytes | str]] = []
    for sample in samples:
        try:
            results.append((sample, normalise(sample.read(), max_side, sample.box)))
        except DECODE_ERRORS as error:
            results.append((sample, plain(why_not(error))))
    return results


def _convert(samples: list[Sample], max_side: int | None, pool: ThreadPoolExecutor) -> Iterator[tuple[Sample, bytes | str]]:
    """Convert in threads (Pillow releases the lock while it decodes), in order, with a bounded number in flight."""
    flying: deque[Future[list[tuple[Sample, bytes | str]]]] = deque()
    for first in range(0, len(samples), _CHUNK):
        flying.append(pool.submit(_converted, samples[first : first + _CHUNK], max_side))
        if len(flying) >= _MAX_FLYING:
            yield from flying.popleft().result()
    for chunk in flying:
        yield from chunk.result()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member without date or owner; the offset of its data."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    offset = tar.offset + _HEADER
    tar.addfile(member, BytesIO(data))
    return offset


class _Writer:
    """Collects columns while it writes tars."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[Shard] = []
        self.rows: list[tuple[Sample, int, int, int]] = []  # sample, shard, offset, size
        self.unreadable: list[Unreadable] = []
        self.hash = hashlib.blake2b(digest_size=16)
        self.digests = bytearray()  # 16 bytes a row

    def write_shard(self, split: Split, images: Iterator[tuple[Sample, bytes | str]], label_of: dict[str, int]) -> None:
        """One tar; none if no image of it could be read."""
        number = sum(shard.split == split for shard in self.shards)
        path = self.folder / f"{split}-{number:06d}.tar"
        first = len(self.rows)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample, image in images:
                if isinstance(image, str):
                    self.unreadable.append(Unreadable(sample.source, image))
                    continue
                key = row_key(len(self.rows))
                self.rows.append((sample, len(self.shards), _add(tar, f"{key}.jpg", image), len(image)))
                _add(tar, f"{key}.cls", str(label_of[sample.class_name]).encode())
                self.hash.update(repr((sample.class_name, split, sample.query, sample.gallery, len(image), *sample.extra)).encode())
                self.hash.update(image)
                self.digests += hashlib.blake2b(image, digest_size=16).digest()
        if len(self.rows) == first:
            path.unlink()
        else:
            self.shards.append(Shard(path.name, split, len(self.rows) - first, path.stat().st_size))

    def columns(self, label_of: dict[str, int], extra: list[str]) -> dict[str, np.ndarray]:
        """The index columns, by name."""
        samples = [row[0] for row in self.rows]
        values = [dict(sample.extra) for sample in samples] if extra else []
        return {
            "label": np.array([label_of[sample.class_name] for sample in samples], np.int64),
            "split": np.array([SPLITS.index(sample.split) for sample in samples], np.uint8),
            "query": np.array([sample.query for sample in samples], np.bool_),
            "gallery": np.array([sample.gallery for sample in samples], np.bool_),
            "shard": np.array([row[1] for row in self.rows], np.int32),
            "offset": np.array([row[2] for row in self.rows], np.int64),
            "size": np.array([row[3] for row in self.rows], np.int64),
            "source": np.array([sample.source.encode() for sample in samples]),
            **{name: np.array([value.get(name, "").encode() for value in values]) for name in extra},
        }

    def duplicates(self, columns: dict[str, np.ndarray]) -> Duplicates:
        """Count the images that are stored more than once; if there are any, one file lists them all."""
        found = find_groups(bytes(self.digests), columns["label"], columns["split"])
        if len(found.across_splits):
            samples = [[self.rows[row][0] for row in found.members(group)] for group in range(len(found.across_splits))]
            listed = [[{"source": one.source, "class": one.class_name, "split": one.split} for one in group] for group in samples]
            (self.folder / DUPLICATES).write_text(json.dumps(listed, ensure_ascii=False, indent=0), encoding="utf-8")
        return Duplicates(
            groups=len(found.across_splits),
            images=len(found.rows),
            across_classes=int(found.across_classes.sum()),
            across_splits=int(found.across_splits.sum()),
            examples=[[self.rows[row][0].source for row in found.members(group)[:_NAMED]] for group in found.examples()],
        )


def write_shards(
    reading: Reading,
    out: Path,
    *,
    seed: int = 0,
    max_side: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Write shards, index and manifest into ``out``, which holds them all or none of them at any moment.

    Args:
        reading: what a reader found.
        seed: order of the classes.
        max_side: larger images are shrunk to this longer side; None keeps every size.
        force: replace the prepared data set that is there.
        progress: called with (images done, images in all).

    Returns:
        Whether anything was written; False: this very data set is already there.

    Raises:
        InputError: nothing to train on, ``out`` holds something else or is being written to, or it cannot be written.
    """
    out = Path(os.path.realpath(out))
    check_usable(reading.samples, reading.name)
    mark = fingerprint(reading, seed, max_side)
    if not force and (out / MANIFEST).is_file() and read_manifest(out).fingerprint == mark:
        return False
    try:
        with claimed(out) as folder:
            check_free(out, force)
            _write(reading, folder, mark, seed, max_side, progress)
            commit(out, force)
    except OSError as error:  # of writing: an image that cannot be read is listed instead
        where = f" ({error.filename})" if error.filename else ""
        cure = "free some space there" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "see that you may write there"
        raise InputError(f"--out {out} cannot be written: {error.strerror or error}{where}; {cure}, or use another --out") from error
    return True


def _write(reading: Reading, folder: Path, mark: str, seed: int, max_side: int | None, progress: Callable[[int, int], None] | None) -> None:
    """Write the whole data set into a folder."""
    writer = _Writer(folder)
    names = sorted({sample.class_name for sample in reading.samples} - {NO_CLASS})
    label_of = {name: label for label, name in enumerate(names)} | {NO_CLASS: NO_LABEL}
    done = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for split, group in _in_shard_order(reading.samples, seed):
            writer.write_shard(split, _convert(group, max_side, pool), label_of)
            done += len(group)
            if progress:
                progress(done, len(reading.samples))
    check_usable([row[0] for row in writer.rows], f"{reading.name}, without its {len(writer.unreadable)} unreadable images,")
    extra = sorted({name for sample in reading.samples for name, _ in sample.extra})
    columns = writer.columns(label_of, extra)
    save_index(folder, columns, names, _manifest(writer, reading, mark, extra, writer.duplicates(columns)))


def _manifest(writer: _Writer, reading: Reading, mark: str, extra: list[str], duplicates: Duplicates) -> Manifest:
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
