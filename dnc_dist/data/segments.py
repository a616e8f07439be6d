"""The images of rows, by reading their shards from front to back through WebDataset, from the first of the rows to the last."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys, tar_file_expander

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.base.foreign import shorten
from dnc_dist.data.index import DatasetIndex, row_key
from dnc_dist.data.manifest import COPY_AGAIN

_BLOCK = 512  # of a tar: the header before the data, and what data is padded to
_SKIP_BYTES = 8 << 20  # unwanted bytes in a row beyond which it is better to begin anew behind them


class Segment(NamedTuple):
    """The bytes [start, stop) of a shard, which hold the rows [first, last] of a list, whole members of the tar."""

    shard: int
    start: int
    stop: int
    first: int
    last: int


def segments_of(index: DatasetIndex, rows: NDArray[np.int64]) -> list[Segment]:
    """Where the rows (n,) are, in their order: a new segment for another shard, an earlier row, and after a large gap."""
    shard, offset, size = (np.asarray(index.columns[name][rows]).astype(np.int64) for name in ("shard", "offset", "size"))
    start, stop = offset - _BLOCK, -(-(offset + size) // _BLOCK) * _BLOCK
    gap = start[1:] - stop[:-1]
    cuts = np.flatnonzero((np.diff(shard) != 0) | (gap < 0) | (gap > _SKIP_BYTES)) + 1
    bounds = [0, *cuts.tolist(), len(rows)] if len(rows) else []
    return [Segment(int(shard[first]), int(start[first]), int(stop[after - 1]), first, after - 1) for first, after in pairwise(bounds)]


class _Kept:
    """A stream whose failure is kept as it was: tar readers add to an error's message what they know."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.failure: Exception | None = None

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes."""
        try:
            return self.stream.read(size)
        except (InputError, RunError) as error:
            self.failure = type(error)(str(error))
            raise


def read_rows(index: DatasetIndex, rows: NDArray[np.int64]) -> Iterator[bytes]:
    """The encoded image of each row, in the order of the rows; what lies between them is read and passed over.

    Raises:
        InputError: a shard is no tar file any more, or does not hold a row.
        RunError: a source does not answer.
    """
    for segment in segments_of(index, rows):
        with closing(index.shards.open(segment.shard, segment.start, segment.stop)) as stream:
            yield from _rows_of(index, segment, rows[segment.first : segment.last + 1], _Kept(stream))


def _rows_of(index: DatasetIndex, segment: Segment, rows: NDArray[np.int64], stream: _Kept) -> Iterator[bytes]:
    name = index.shards.name(segment.shard)
    wanted = iter([row_key(row) for row in rows.tolist()])
    key = next(wanted, None)
    try:
        for sample in _samples(name, stream):
            if sample["__key__"] == key and "jpg" in sample:
                yield sample["jpg"]
                key = next(wanted, None)
                if key is None:
                    return
    except (tarfile.TarError, ValueError) as error:  # ValueError: a name twice, or bytes that are no header
        if stream.failure is not None:
            raise stream.failure from None
        raise InputError(f"{name} cannot be read as a tar file ({shorten(error.args[0])}); {COPY_AGAIN}") from error
    except RunError:
        assert stream.failure is not None
        raise stream.failure from None
    raise InputError(f"row {key} is not in {name}; {COPY_AGAIN}")


def _samples(name: str, stream: _Kept) -> Iterator[dict[str, Any]]:
    return group_by_keys(tar_file_expander(iter([{"url": name, "stream": stream}]), select_files=_is_image))


def _is_image(name: str) -> bool:
    return name.endswith(".jpg")
