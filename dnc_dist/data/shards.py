"""The shard writer: samples to WebDataset tars, index and manifest, the same bytes on every run; and reading rows by offset."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tarfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import numpy as np

from dnc_dist.data.images import DECODE_ERRORS, normalise
from dnc_dist.data.index import FORMAT, MANIFEST, SPLITS, DatasetIndex, read_manifest, row_key, save_index
from dnc_dist.data.readers import Reading, Sample
from dnc_dist.errors import InputError
from dnc_dist.rng import numpy_generator

SHARD_BYTES = 256 * 2**20
MIN_SHARDS = 64
_HEADER = 512  # a ustar header; keys are short, so that it is always one block
_MAX_OPEN = 64
_CHUNK, _MAX_FLYING = 16, 16  # images converted at a time by a thread, and chunks in memory


def check_trainable(samples: list[Sample], origin: str) -> None:
    """Refuse what nothing can be learned from.

    Raises:
        InputError: no image at all, none to train on, a single training class, or no training class with two images.
    """
    if not samples:
        raise InputError(f"{origin} holds no image; expected split/class/*.jpg, class/*.jpg or a CSV that lists images")
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


def _in_shard_order(samples: list[Sample], seed: int) -> list[tuple[str, list[Sample]]]:
    """Groups (split, samples of one shard): classes in seeded random order, a class's samples together."""
    groups = []
    for split in SPLITS:
        classes: dict[str, list[Sample]] = {}
        for sample in samples:
            if sample.split == split:
                classes.setdefault(sample.class_name, []).append(sample)
        names = sorted(classes)
        ordered = [names[i] for i in numpy_generator(seed, "class order", split).permutation(len(names))]
        shards = shard_of_class([sum(sample.num_bytes() for sample in classes[name]) for name in ordered])
        for shard in range(shards[-1] + 1 if shards else 0):
            groups.append((split, [sample for name, at in zip(ordered, shards, strict=True) if at == shard for sample in classes[name]]))
    return groups


def fingerprint(reading: Reading, seed: int, max_side: int | None) -> str:
    """A hash of everything that determines the shards: options and the list of samples with their sizes and dates."""
    digest = hashlib.blake2b(repr((FORMAT, reading.name, sorted(reading.options.items()), seed, max_side)).encode(), digest_size=16)
    for sample in reading.samples:
        state = sample.data if sample.data is not None else (sample.num_bytes(), sample.location().stat().st_mtime_ns)
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
            results.append((sample, f"{type(error).__name__}: {error}"))
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
        self.shards: list[dict[str, Any]] = []
        self.rows: list[tuple[Sample, int, int, int]] = []  # sample, shard, offset, size
        self.unreadable: list[dict[str, str]] = []
        self.hash = hashlib.blake2b(digest_size=16)

    def write_shard(self, split: str, images: Iterator[tuple[Sample, bytes | str]], label_of: dict[str, int]) -> None:
        """One tar; none if no image of it could be read."""
        number = sum(shard["split"] == split for shard in self.shards)
        path = self.folder / f"{split}-{number:06d}.tar"
        first = len(self.rows)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample, image in images:
                if isinstance(image, str):
                    self.unreadable.append({"source": sample.source, "reason": image})
                    continue
                key = row_key(len(self.rows))
                self.rows.append((sample, len(self.shards), _add(tar, f"{key}.jpg", image), len(image)))
                _add(tar, f"{key}.cls", str(label_of[sample.class_name]).encode())
                self.hash.update(repr((sample.class_name, split, sample.query, sample.gallery, len(image), *sample.extra)).encode())
                self.hash.update(image)
        if len(self.rows) == first:
            path.unlink()
        else:
            self.shards.append({"name": path.name, "split": split, "rows": len(self.rows) - first, "bytes": path.stat().st_size})

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


def _may_write(out: Path, mark: str, force: bool) -> bool:
    """Whether to write: False if the very same data set is already there.

    Raises:
        InputError: something else is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return True
    prepared = (out / MANIFEST).is_file()
    if force and prepared:
        return True
    if prepared and read_manifest(out).get("fingerprint") == mark:
        return False
    what = "another prepared data set; use --force to replace it, or another --out" if prepared else "other files; use another --out"
    raise InputError(f"{out} already holds {what}")


def write_shards(
    reading: Reading,
    out: Path,
    *,
    seed: int = 0,
    max_side: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Write shards, index and manifest into ``out``: beside it first, then moved into place by a rename.

    Args:
        reading: what a reader found.
        seed: order of the classes.
        max_side: larger images are shrunk to this longer side; None keeps every size.
        force: replace the prepared data set that is there.
        progress: called with (images done, images in all).

    Returns:
        Whether anything was written; False: this very data set is already there.

    Raises:
        InputError: nothing to train on, or ``out`` holds something else.
    """
    out = out.resolve()
    check_trainable(reading.samples, reading.name)
    mark = fingerprint(reading, seed, max_side)
    if not _may_write(out, mark, force):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.partial-{os.getpid()}"
    folder.mkdir()
    try:
        writer = _Writer(folder)
        label_of = {name: label for label, name in enumerate(sorted({sample.class_name for sample in reading.samples}))}
        done = 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for split, group in _in_shard_order(reading.samples, seed):
                writer.write_shard(split, _convert(group, max_side, pool), label_of)
                done += len(group)
                if progress:
                    progress(done, len(reading.samples))
        check_trainable([row[0] for row in writer.rows], f"{reading.name}, without its {len(writer.unreadable)} unreadable images,")
        extra = sorted({name for sample in reading.samples for name, _ in sample.extra})
        save_index(folder, writer.columns(label_of, extra), sorted(label_of), _manifest(writer, reading, mark, extra))
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return True


def _manifest(writer: _Writer, reading: Reading, mark: str, extra: list[str]) -> dict[str, Any]:
    splits = {}
    for split in SPLITS:
        names = [row[0].class_name for row in writer.rows if row[0].split == split]
        if names:
            splits[split] = {"rows": len(names), "classes": len(set(names))}
    return {
        "format": FORMAT,
        "reader": reading.name,
        "options": reading.options,
        "notes": reading.notes,
        "fingerprint": mark,
        "content_hash": writer.hash.hexdigest(),
        "num_rows": len(writer.rows),
        "splits": splits,
        "extra_columns": extra,
        "shards": writer.shards,
        "unreadable": writer.unreadable,
    }


class ShardReader:
    """Reads the encoded image of a row by its offset; keeps a few shards open. Safe to fork and to pickle."""

    def __init__(self, index: DatasetIndex) -> None:
        self.index, self.paths = index, index.shard_paths
        self.shard, self.offset, self.size = (index.columns[name] for name in ("shard", "offset", "size"))
        self._files: OrderedDict[int, FileIO] = OrderedDict()

    def read(self, row: int) -> bytes:
        """The bytes of one row.

        Raises:
            OSError: the shard cannot be read, or ends before the row does. (It was complete when the index was opened.)
        """
        shard, size = int(self.shard[row]), int(self.size[row])
        data = os.pread(self._open(shard).fileno(), size, int(self.offset[row]))
        if len(data) != size:
            raise OSError(f"{self.paths[shard]} ended within row {row_key(row)}; it changed while it was being read")
        return data

    def _open(self, shard: int) -> FileIO:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            if len(self._files) >= _MAX_OPEN:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = FileIO(self.paths[shard])
        return self._files[shard]

    def close(self) -> None:
        """Close the shards that are open."""
        while self._files:
            self._files.popitem()[1].close()

    def __reduce__(self) -> tuple[type[ShardReader], tuple[DatasetIndex]]:
        return ShardReader, (self.index,)
