"""Reading the encoded image of a row by its offset in its shard."""

from __future__ import annotations

import os
from collections import OrderedDict
from io import FileIO

from dnc_dist.data.index import DatasetIndex, row_key

_MAX_OPEN = 64


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
