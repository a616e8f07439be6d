"""What is looked at before a run streams its first shard: lanes and shards against ranks and workers, and whether a server sends parts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dnc_dist.base.errors import InputError
from dnc_dist.data.index import DatasetIndex, RowView
from dnc_dist.data.remote import knows_ranges
from dnc_dist.data.shard_files import RemoteShards


def stream_notes(index: DatasetIndex, view: RowView, *, lanes: int, world: int, workers: int) -> Iterator[str]:
    """What is worth changing before a training streams a view, each with the number to use.

    Raises:
        InputError: there are fewer lanes than ranks, or several readers would have to share a shard of a server that sends whole files
            only, so that each would read it from its beginning.
        RunError: the server does not answer.
    """
    if world > lanes:
        raise InputError(f"data.lanes={lanes} is less than one for each of {world} ranks; set it to a multiple of {world}")
    remote = index.shards if isinstance(index.shards, RemoteShards) else None
    if remote is not None and remote.cache is not None and (size := sum(size for _, size in remote.shards)) > remote.cache.most:
        yield (
            f"data.cache_gb={remote.cache.most / 1e9:g} is less than the {size / 1e9:.2f} GB of the shards; what does not fit is read "
            "from the server in every epoch"
        )
    readers = world * max(workers, 1)
    if readers > lanes:
        yield (
            f"data.lanes={lanes} keeps {lanes // world} of the {workers} workers of a rank busy; data.lanes={readers} keeps all "
            "(other lanes make other batches: only for a new run)"
        )
    shards = len(np.unique(view.shards))
    readers = min(readers, lanes)
    if shards >= readers:
        return
    cure = f"prepare the data set with `--shards {readers}` or more"
    if shards == len(np.unique(view.labels)):
        cure = f"it has no more classes, and a class is in one shard; use fewer ranks or data.workers, {shards} together at most"
    if remote is not None:
        url = remote.name(int(view.shards[0]))
        if not knows_ranges(url, remote.web.patience):
            raise InputError(
                f"{view.name}: {shards} shards are fewer than {readers} readers (ranks x workers), and the server of {url} sends whole "
                f"files only (no range requests), so that a reader could not begin inside of one; {cure}"
            )
    yield f"{view.name}: {shards} shards are fewer than {readers} readers (ranks x workers); some begin inside of a shard; {cure}"
