"""Reading the encoded image of a row by its offset in its shard."""

from __future__ import annotations

import os
from collections import OrderedDict
from io import FileIO

from dnc_dist.data.index import DatasetIndex, row_key
from dnc_dist.data.shard_files import LocalShards, RemoteShards

_MAX_OPEN = 64


class ShardReader:
    """Reads the encoded image of a row by its offset; keeps a few shards open. Safe to fork and to pickle.

    From shards on a server every row is one request.
    """

    def __init__(self, index: DatasetIndex) -> None:
        self.index = index
        self.shard, self.offset, self.size = (index.columns[name] for name in ("shard", "offset", "size"))
        self._files: OrderedDict[int, FileIO] = OrderedDict()

    def read(self, row: int) -> bytes:
        """The bytes of one row.

        Raises:
            OSError: the shard cannot be read, or ends before the row does. (It was complete when the index was opened.)
            InputError, RunError: a server has it no more, or does not answer.
        """
        shard, offset, size = int(self.shard[row]), int(self.offset[row]), int(self.size[row])
        if isinstance(self.index.shards, RemoteShards):
            with self.index.shards.open(shard, offset, offset + size) as stream:
                return stream.read()
        data = os.pread(self._open(self.index.shards, shard).fileno(), size, offset)
        if len(data) != size:
            raise OSError(f"{self.index.shards.name(shard)} ended within row {row_key(row)}; it changed while it was being read")
        return data

    def _open(self, shards: LocalShards, shard: int) -> FileIO:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            if len(self._files) >= _MAX_OPEN:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = FileIO(shards.paths[shard])
        return self._files[shard]

    def close(self) -> None:
        """Close the shards that are open."""
        while self._files:
            self._files.popitem()[1].close()

    def __reduce__(self) -> tuple[type[ShardReader], tuple[DatasetIndex]]:
        return ShardReader, (self.index,)
