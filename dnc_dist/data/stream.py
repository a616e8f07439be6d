"""Batches for training (by offset through the index) and sequential passes (streamed through WebDataset) on this rank."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed import ProcessGroup
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from dnc_dist.base.rng import uniform
from dnc_dist.data.batching import EpochSchedule
from dnc_dist.data.index import DatasetIndex, RowView
from dnc_dist.data.loading import Batch, DecodedBlock, Request, assemble, dummy, load_image, stack
from dnc_dist.data.rows import ShardReader
from dnc_dist.data.segments import read_rows
from dnc_dist.data.transforms import CROP_UNIFORMS, Geometry
from dnc_dist.data.transport import batches_of, loader

_log = logging.getLogger(__name__)


class _StepDataset(Dataset[Batch]):
    """Turns requests into batches; holds nothing of the epoch, so that its workers live as long as the training."""

    def __init__(self, index: DatasetIndex, geometry: Geometry, seed: int) -> None:
        self.index, self.geometry, self.seed = index, geometry, seed
        self.reader = ShardReader(index)

    def __getitem__(self, request: Request) -> Batch:
        data = (self.reader.read(row) for row in request.rows.tolist())
        return load_batch(self.index, self.geometry, self.seed, request, data)


def load_batch(index: DatasetIndex, geometry: Geometry, seed: int, request: Request, data: Iterable[bytes]) -> Batch:
    """The batch of a request from the encoded images of its rows; random crops are keyed by step and slot."""
    size = geometry.image_size
    if not len(request.rows):
        return dummy(request.step, size, request.rows_of_ranks)
    numbers = None
    if geometry.uses_uniforms:
        numbers = uniform((seed, "crop", request.step), torch.from_numpy(request.slots), CROP_UNIFORMS)
    images = [load_image(one, geometry, None if numbers is None else numbers[at]) for at, one in enumerate(data)]
    return assemble(index, request, images, size)


class _Requests(Sampler[Request]):
    """The requests of the epoch that is set; the loader iterates it anew in every epoch."""

    def __init__(self) -> None:
        self.requests: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.requests


class TrainBatches:
    """Batches of this rank over the steps of a schedule, loaded ahead by workers.

    Workers are started once, at the first epoch, and kept.
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
        self.view = view
        self._requests = _Requests()
        self._loader: DataLoader[Any] | None = loader(
            _StepDataset(index, geometry, seed),
            workers=workers,
            pin_memory=pin_memory,
            sampler=self._requests,
            keep_workers=True,
        )

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
        """The batches of a schedule from its step ``skip`` on.

        Args:
            schedule: of places in this object's view.
            first_step: global number of the schedule's step 0; random crops are keyed by the global number.
            skip: steps already done; resuming needs nothing else.
            rank: whose slice; ``world`` ranks share every step.
            group: the ranks that share this rank's learners; None: all.
        """
        assert self._loader is not None, "closed"
        self._requests.requests = self._plan(schedule, first_step, skip, rank, world)
        positives = schedule.max_rows_per_class(self.view.labels) - 1
        # Here, as a process group cannot travel to a worker.
        return (
            batch._replace(group=group, max_positives=positives, rows_of_world=schedule.rows_of_world(batch.step - first_step, world))
            for batch in batches_of(self._loader)
        )

    def _plan(self, schedule: EpochSchedule, first_step: int, skip: int, rank: int, world: int) -> Iterator[Request]:
        for number in range(skip, len(schedule)):
            step = schedule[number]
            start, stop = schedule.local_slots(number, rank, world)
            places = step.places[start:stop]
            yield Request(
                first_step + number,
                self.view.rows[places],
                self.view.labels[places],
                step.learner[start:stop],
                np.arange(start, stop),
                schedule.rows_of_ranks(number, rank, world),
            )

    def close(self) -> None:
        """Stop the workers."""
        self._loader = None


class _Block(NamedTuple):
    """Consecutive places [start, stop) of a view that lie in one shard."""

    number: int
    shard: int
    start: int
    stop: int


def blocks_of(view: RowView, block_size: int) -> list[_Block]:
    """The view in blocks of at most ``block_size`` rows, none across two shards; they depend on nothing else."""
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(view.shards)) + 1, [len(view)]])
    blocks: list[_Block] = []
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        for start in range(first, last, block_size):
            blocks.append(_Block(len(blocks), int(view.shards[first]), start, min(start + block_size, last)))
    return blocks


class _SequentialDataset(IterableDataset[DecodedBlock]):
    """The blocks of one rank, divided among its workers."""

    def __init__(self, index: DatasetIndex, view: RowView, geometry: Geometry, parts: list[list[_Block]], streaming: bool) -> None:
        self.index, self.view, self.geometry, self.parts, self.streaming = index, view, geometry, parts, streaming

    def __iter__(self) -> Iterator[DecodedBlock]:
        info = get_worker_info()
        blocks = self.parts[info.id if info else 0]
        rows = np.concatenate([self.view.rows[block.start : block.stop] for block in blocks]) if blocks else self.view.rows[:0]
        data = read_rows(self.index, rows) if self.streaming or self.index.is_remote else self._indexed(blocks)
        for block in blocks:
            images = [load_image(next(data), self.geometry, None) for _ in range(block.start, block.stop)]
            pixels, valid, failed = stack(self.index, self.view.rows[block.start : block.stop], images, self.geometry.image_size)
            yield DecodedBlock(pixels, torch.arange(block.start, block.stop), valid, failed, block.number)

    def _indexed(self, blocks: list[_Block]) -> Iterator[bytes]:
        with closing(ShardReader(self.index)) as reader:
            for block in blocks:
                for row in self.view.rows[block.start : block.stop]:
                    yield reader.read(int(row))


class SequentialBatches:
    """One pass over a view in fixed blocks that do not depend on the number of ranks; every row on exactly one rank.

    Whole shards are streamed through WebDataset where there are enough of them for all workers of all ranks; otherwise blocks are
    read through the index (of a server: each worker streams a part), which one message says. A rank's rows have the places ``bounds``
    [start, stop) of the view in either case, but with workers they do not arrive in order: ``DecodedBlock.places`` says where each
    belongs.
    """

    def __init__(
        self,
        index: DatasetIndex,
        view: RowView,
        geometry: Geometry,
        *,
        block_size: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        lanes = max(workers, 1)
        blocks = blocks_of(view, block_size)
        shards = list(dict.fromkeys(block.shard for block in blocks))
        self.streaming = len(shards) >= world * lanes
        if not self.streaming and rank == 0:
            how = "some begin in the middle of a shard" if index.is_remote else "reading through the index"
            _log.info("%s: %d shards are fewer than %d ranks x %d workers; %s", view.name, len(shards), world, lanes, how)
        if self.streaming:
            first, parts = _by_shard(blocks, shards, rank, world, lanes)
        else:
            first, parts = _by_block(blocks, rank, world, lanes, in_turn=not index.is_remote)
        self.num_batches = sum(len(part) for part in parts)
        starts = [*(block.start for block in blocks), len(view)]
        self.bounds = (starts[first], starts[first + self.num_batches])
        self._loader = loader(_SequentialDataset(index, view, geometry, parts, self.streaming), workers=workers, pin_memory=pin_memory)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[DecodedBlock]:
        return batches_of(self._loader)


def _by_shard(blocks: list[_Block], shards: list[int], rank: int, world: int, lanes: int) -> tuple[int, list[list[_Block]]]:
    """Whole shards in contiguous runs to ranks and within them to workers: the rank's first block, and its workers' blocks."""
    lane_of = {shard: at * world * lanes // len(shards) for at, shard in enumerate(shards)}
    parts = [[block for block in blocks if lane_of[block.shard] == rank * lanes + lane] for lane in range(lanes)]
    return sum(lane_of[block.shard] < rank * lanes for block in blocks), parts


def _by_block(blocks: list[_Block], rank: int, world: int, lanes: int, *, in_turn: bool) -> tuple[int, list[list[_Block]]]:
    """A contiguous balanced run of blocks to each rank: the rank's first block, and its workers' blocks, in turn or contiguous, too."""
    first, stop = len(blocks) * rank // world, len(blocks) * (rank + 1) // world
    if in_turn:
        return first, [blocks[first + lane : stop : lanes] for lane in range(lanes)]
    bounds = [first + (stop - first) * lane // lanes for lane in range(lanes + 1)]
    return first, [blocks[start:end] for start, end in pairwise(bounds)]
