"""Training batches of this rank from shards that are read from front to back: the bytes follow the plan of ``stream_plan``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.data import IterableDataset, get_worker_info

from dnc_dist.data.batching import EpochSchedule
from dnc_dist.data.index import DatasetIndex, RowView
from dnc_dist.data.loading import Batch, Request
from dnc_dist.data.segments import read_rows
from dnc_dist.data.stream import load_batch
from dnc_dist.data.stream_plan import StreamSchedule, lanes_of_ranks
from dnc_dist.data.transforms import Geometry
from dnc_dist.data.transport import PREFETCH, batches_of, loader


class _Work(NamedTuple):
    """What one worker does in an epoch: it reads some lanes, and loads their rows of each step.

    ``reading``: for each lane the rows (n,) of the index that are still needed, in the order in which they are read; ``requests``: one
    for every step, with the lane (among these) of each of its rows.
    """

    reading: list[NDArray[np.int64]]
    requests: list[tuple[Request, list[int]]]


class LaneReader:
    """A lane that is read only as far as a step needs; what is needed later waits, undecoded."""

    def __init__(self, index: DatasetIndex, rows: NDArray[np.int64]) -> None:
        self._rows = iter(rows.tolist())
        self._images = read_rows(index, rows)
        self.waiting: dict[int, bytes] = {}

    def take(self, row: int) -> bytes:
        """The image of a row, which is then forgotten."""
        while row not in self.waiting:
            self.waiting[next(self._rows)] = next(self._images)
        return self.waiting.pop(row)


class _LanesDataset(IterableDataset[Batch]):
    """The parts of all steps of an epoch that come from a worker's lanes; a dummy for a step in which they give no row."""

    def __init__(self, index: DatasetIndex, geometry: Geometry, seed: int, works: list[_Work]) -> None:
        self.index, self.geometry, self.seed, self.works = index, geometry, seed, works

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        work = self.works[info.id if info else 0]
        lanes = [LaneReader(self.index, rows) for rows in work.reading]
        for request, lane_of_row in work.requests:
            data = [lanes[lane].take(row) for lane, row in zip(lane_of_row, request.rows.tolist(), strict=True)]
            yield load_batch(self.index, self.geometry, self.seed, request, data)


class StreamBatches:
    """Batches of this rank over the steps of a schedule; each of its workers reads some of its lanes.

    The workers are started anew for every epoch. Ranks, workers and the step that is begun with change nothing in a step's global batch.
    """

    def __init__(
        self,
        index: DatasetIndex,
        view: RowView,
        geometry: Geometry,
        *,
        seed: int,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.index, self.view, self.geometry, self.seed = index, view, geometry, seed
        self.workers, self.pin_memory = workers, pin_memory

    def epoch(
        self,
        schedule: EpochSchedule,
        *,
        first_step: int,
        skip: int = 0,
        rank: int = 0,
        world: int = 1,
        group: ProcessGroup | None = None,
    ) -> Iterator[Batch]:
        """The batches of a schedule from its step ``skip`` on; arguments as of ``TrainBatches.epoch``.

        Rows of steps that are done are not read again, but where they lie between rows that are needed.
        """
        assert isinstance(schedule, StreamSchedule)
        first, stop = lanes_of_ranks(schedule.lanes, world)[rank : rank + 2].tolist()
        workers = min(self.workers, stop - first)
        parts = max(workers, 1)
        bounds = [first + (stop - first) * part // parts for part in range(parts + 1)]
        ranks = [schedule.rows_of_ranks(number, rank, world) for number in range(skip, len(schedule))]
        works = [self._work(schedule, first_step, skip, bounds[part], bounds[part + 1], ranks) for part in range(parts)]
        source = loader(
            _LanesDataset(self.index, self.geometry, self.seed, works),
            workers=workers,
            prefetch=PREFETCH * parts,  # a part is so much smaller than a batch
            pin_memory=self.pin_memory,
        )
        positives = schedule.max_rows_per_class(self.view.labels) - 1
        loaded = batches_of(source)
        for number in range(skip, len(schedule)):
            batch = _joined([next(loaded) for _ in range(parts)])
            yield batch._replace(group=group, max_positives=positives, rows_of_world=schedule.rows_of_world(number, world))

    def _work(self, schedule: StreamSchedule, first_step: int, skip: int, first: int, stop: int, ranks: list[list[int]]) -> _Work:
        """The part of lanes [first, stop)."""
        needed = np.zeros(len(self.view), bool)
        needed[schedule.places[schedule.starts[skip] :]] = True
        reading = [self.view.rows[places[needed[places]]] for places in schedule.reading[first:stop]]
        requests = []
        for number, rows_of_ranks in zip(range(skip, len(schedule)), ranks, strict=True):
            step = schedule[number]
            lanes = schedule.lane_of_slot[schedule.starts[number] : schedule.starts[number + 1]]
            slots = np.flatnonzero((lanes >= first) & (lanes < stop))
            places = step.places[slots]
            request = Request(
                first_step + number, self.view.rows[places], self.view.labels[places], step.learner[slots], slots, rows_of_ranks
            )
            requests.append((request, (lanes[slots] - first).tolist()))
        return _Work(reading, requests)

    def close(self) -> None:
        """Nothing is kept between epochs."""


def _joined(parts: list[Batch]) -> Batch:
    """One batch of the parts that workers loaded, without the dummies of those that had no row; the parts are in the order of the slots."""
    with_rows = [part for part in parts if bool((part.rows >= 0).any())] or parts[:1]
    if len(with_rows) == 1:
        return with_rows[0]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in with_rows])

    return with_rows[0]._replace(
        images=joined("images"),
        labels=joined("labels"),
        learner=joined("learner"),
        rows=joined("rows"),
        slots=joined("slots"),
        valid=joined("valid"),
        failed=[key for part in with_rows for key in part.failed],
    )
