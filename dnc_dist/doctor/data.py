"""Data: the same complete dataset on every rank, splits and protocol that fit the configuration, and images that can be decoded."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import printable
from dnc_dist.base.progress import Progress
from dnc_dist.base.wording import listed
from dnc_dist.clustering.division import check_num_learners
from dnc_dist.config import RunConfig
from dnc_dist.data.images import DECODE_ERRORS, decode, why_not
from dnc_dist.data.index import DatasetIndex, RowView, open_index, train_view, validation_view
from dnc_dist.data.jpeg import without_metadata
from dnc_dist.data.manifest import DUPLICATES, MANIFEST, STAGING, read_manifest, shard_problems
from dnc_dist.data.rows import ShardReader
from dnc_dist.data.summary import told_duplicates
from dnc_dist.doctor.table import Check, Section
from dnc_dist.engine.dataset import LOCAL_DATA, columns_of, open_data
from dnc_dist.processes import distributed

# Rows of each shard that a sample decodes, its first and its last among them.
_SAMPLE = 8
_COPY_AGAIN = "copy the dataset again, or prepare it again with `dnc-dist data prepare … --force`"


class _Copy(NamedTuple):
    """The dataset as one rank sees it: its hashes (empty without a manifest) and what is wrong."""

    host: str
    content_hash: str
    layout_hash: str
    problems: list[str]


class _Reading(NamedTuple):
    """What a rank found in its share of the images: how many, in how many seconds, key -> why undecodable, how many hold metadata."""

    images: int
    seconds: float
    undecodable: dict[str, str]
    with_metadata: int


def check_data(cfg: RunConfig, *, decode_all: bool) -> Section:
    """Collective. The dataset of a configuration: its copies, what they hold, and a sample of the images or all of them."""
    root = os.environ.get(LOCAL_DATA) or cfg.data.root
    copies = distributed.gather_objects(_look(Path(root), cfg.data.root) if isinstance(cfg.data.root, Path) else _look_at_server(cfg))
    checks = [_compare(copies)]
    problems = {f"rank {rank} ({copy.host}): {problem}": None for rank, copy in enumerate(copies) for problem in copy.problems}
    values: dict[str, object] = {"root": str(root), "content_hash": copies[0].content_hash, "problems": list(problems)}
    if problems:
        checks.append(Check("files", listed(list(problems)), "failed", f"{_COPY_AGAIN}; what it holds was not looked at"))
        return Section("data", str(root), checks, {"data": values})
    index = open_data(cfg)
    size = sum(shard.bytes for shard in index.manifest.shards) / 1e9
    checks.append(Check("files", f"{len(index.shard_paths)} shards, {size:,.2f} GB, complete on every rank"))
    checks += _contents(index, cfg)
    readings = distributed.gather_objects(_read(index, _my_rows(index, [copy.host for copy in copies], decode_all)))
    checks += [_decoded(readings, len(index), decode_all), _metadata(readings)]
    undecodable = {key: reason for reading in readings for key, reason in reading.undecodable.items()}
    values |= {
        "splits": {split: asdict(count) for split, count in index.manifest.splits.items()},
        "duplicates": asdict(index.manifest.duplicates) if index.manifest.duplicates else None,
        "images_read": sum(reading.images for reading in readings),
        "undecodable": undecodable,
    }
    return Section("data", str(root), checks, {"data": values})


def _look_at_server(cfg: RunConfig) -> _Copy:
    """What a server, or this machine's own copy, says of the data set; its shards are compared with that when they are read."""
    host = socket.gethostname()
    try:
        manifest = open_data(cfg).manifest
        return _Copy(host, manifest.content_hash, manifest.layout_hash, [])
    except (InputError, OSError) as error:
        return _Copy(host, "", "", [str(error)])


def _look(root: Path, named: Path) -> _Copy:
    """This rank's files; ``named`` is where data.root points, elsewhere than ``root`` if the machine has a copy of its own."""
    host = socket.gethostname()
    try:
        manifest = read_manifest(root)
        hashes = manifest.content_hash, manifest.layout_hash
        if root != named and read_manifest(named).content_hash != manifest.content_hash:
            return _Copy(host, *hashes, [f"{LOCAL_DATA}={root} holds another dataset than data.root={named}"])
        problems = list(shard_problems(root, manifest))
        if not problems:
            open_index(root)
    except (InputError, OSError) as error:
        return _Copy(host, "", "", [str(error)])
    return _Copy(host, *hashes, problems)


def _compare(copies: list[_Copy]) -> Check:
    hashes = [copy.content_hash for copy in copies]
    if not all(hashes):
        rank = hashes.index("")
        return Check("manifest", f"cannot be used on rank {rank} ({copies[rank].host})", "failed", _COPY_AGAIN)
    other = next((rank for rank, copy in enumerate(copies) if copy.layout_hash != copies[0].layout_hash), None)
    if other is None:
        return Check("manifest", f"content {hashes[0]} on {len(copies)} rank(s)")
    found = "the same in other shards" if hashes[other] == hashes[0] else hashes[other]
    value = f"rank 0 has content {hashes[0]}, rank {other} ({copies[other].host}) {found}"
    return Check("manifest", value, "failed", "copy the same dataset to every machine")


def _contents(index: DatasetIndex, cfg: RunConfig) -> Iterator[Check]:
    """Splits, division and protocol, as the run would use them."""
    try:
        train = train_view(index, cfg.data.validation_classes, cfg.run.seed)
        validation = validation_view(index, cfg.data.validation_classes, cfg.run.seed)
    except InputError as error:
        yield Check("train", "cannot be split", "failed", str(error))
        return
    single = int((np.bincount(train.labels) == 1).sum())
    advice = f"{single:,} class(es) with one image have no positive pair and are left out" if single else ""
    yield Check("train", _counts(train), "warning" if single else "ok", advice)
    if validation is not None:
        yield Check("validation", _counts(validation))
    test = index.view("test") if "test" in index.splits else None
    if test is None:
        yield Check("test", "none", "warning", "nothing will be evaluated; prepare the dataset with a test split")
    else:
        yield Check("test", f"{_counts(test)}; {test.query.sum():,} queries, {test.gallery.sum():,} in the gallery")
        yield _fits("protocol", lambda: parts.build("protocol", cfg.data.protocol).for_data(columns_of(index, test)).name)
    yield _fits("division", lambda: _learners(train, cfg.division.num_learners))
    yield _stored_twice(index)
    if lost := index.manifest.unreadable:
        named = listed([f"{entry.source}: {entry.reason}" for entry in lost])
        yield Check("left out", f"{len(lost):,} images", "warning", f"unreadable when it was prepared: {named}; all in {MANIFEST}")
    if skipped := [note for note in index.manifest.notes if note.startswith("skipped")]:
        yield Check("skipped", printable("; ".join(skipped)), "warning", "convert what should be in the dataset, and prepare it again")
    if (index.root / STAGING).exists():
        cure = "harmless; the same `dnc-dist data prepare` goes on with them, another one removes them"
        yield Check("left behind", "files of a prepare that is under way or was interrupted", "warning", cure)


def _stored_twice(index: DatasetIndex) -> Check:
    found = index.manifest.duplicates
    if found is None:
        return Check("duplicates", "not looked for", "ok", "prepared by an earlier version; prepare it again to know")
    if not found.groups:
        return Check("duplicates", "none")
    groups = listed([" = ".join(group) for group in found.examples])
    spoils = found.across_splits or found.across_classes
    hint = f"{groups}; all in {DUPLICATES}" + ("; remove them from one of the two, and prepare again" if spoils else "")
    return Check("duplicates", told_duplicates(found), "warning" if spoils else "ok", hint)


def _learners(train: RowView, count: int) -> str:
    check_num_learners(train.labels, count)
    return f"{count} learner(s) have enough classes"


def _fits(name: str, function: Callable[[], str]) -> Check:
    try:
        return Check(name, function())
    except InputError as error:
        return Check(name, "does not fit", "failed", str(error))


def _counts(view: RowView) -> str:
    return f"{len(view):,} images of {view.num_classes:,} classes"


def _my_rows(index: DatasetIndex, hosts: list[str], decode_all: bool) -> NDArray[np.int64]:
    """The rows that this rank reads: the ranks of a host, which may have a copy of its own, share all shards among them."""
    rank = distributed.rank()
    mine = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    starts = np.searchsorted(index.columns["shard"], np.arange(len(index.shard_paths) + 1))
    parts = []
    for shard in range(mine.index(rank), len(index.shard_paths), len(mine)):
        start, stop = int(starts[shard]), int(starts[shard + 1])
        count = stop - start if decode_all else min(_SAMPLE, stop - start)
        parts.append(np.linspace(start, stop - 1, count).round().astype(np.int64))
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _read(index: DatasetIndex, rows: NDArray[np.int64]) -> _Reading:
    undecodable, with_metadata, started = {}, 0, time.monotonic()
    with closing(ShardReader(index)) as reader, Progress(distributed.is_main()).phase("images", len(rows), "img") as phase:
        for row in rows.tolist():
            try:
                data = reader.read(row)
                decode(data)
                with_metadata += without_metadata(data) != data
            except DECODE_ERRORS as error:
                undecodable[index.key(row)] = why_not(error)
            phase.update()
    return _Reading(len(rows), time.monotonic() - started, undecodable, with_metadata)


def _decoded(readings: list[_Reading], total: int, decode_all: bool) -> Check:
    count = sum(reading.images for reading in readings)
    rate = count / max(max(reading.seconds for reading in readings), 1e-9)
    undecodable = sorted({key for reading in readings for key in reading.undecodable})
    if undecodable:
        value = f"{len(undecodable):,} of {count:,} cannot be decoded: {listed(undecodable)}"
        return Check("images", value, "failed", f"they could when the dataset was prepared, so its files have changed; {_COPY_AGAIN}")
    more = "" if decode_all else "; --decode all reads every one"
    return Check("images", f"{count:,} of {total:,} decoded, {rate:,.0f} a second on all ranks{more}")


def _metadata(readings: list[_Reading]) -> Check:
    count = sum(reading.with_metadata for reading in readings)
    if not count:
        return Check("metadata", "none in the images that were read")
    hint = "EXIF may tell where and when a picture was taken; prepare the dataset again with --force before giving it to others"
    return Check("metadata", f"in {count:,} of the images that were read", "warning", hint)
