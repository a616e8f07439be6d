"""Batches for training (by offset through the index) and sequential passes (streamed through WebDataset) on this rank."""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from torch.distributed import ProcessGroup
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import shorten
from dnc_dist.base.rng import uniform
from dnc_dist.data.batching import EpochSchedule
from dnc_dist.data.index import DatasetIndex, RowView, row_key
from dnc_dist.data.loading import Batch, DecodedBlock, Request, assemble, dummy, load_image, stack
from dnc_dist.data.manifest import COPY_AGAIN
from dnc_dist.data.rows import ShardReader
from dnc_dist.data.transforms import CROP_UNIFORMS, Geometry
from dnc_dist.data.transport import batches_of, loader

_log = logging.getLogger(__name__)


class _StepDataset(Dataset[Batch]):
    """Turns requests into batches; holds nothing of the epoch, so that its workers live as long as the training."""

    def __init__(self, index: DatasetIndex, geometry: Geometry, seed: int) -> None:
        self.index, self.geometry, self.seed = index, geometry, seed
        self.reader = ShardReader(index)

    def __getitem__(self, request: Request) -> Batch:
        size = self.geometry.image_size
        if not len(request.rows):
            return dummy(request.step, size, request.rows_of_ranks)
        numbers = None
        if self.geometry.uses_uniforms:
            numbers = uniform((self.seed, "crop", request.step), torch.from_numpy(request.slots), CROP_UNIFORMS)
        images = [
            load_image(self.reader.read(int(row)), self.geometry, None if numbers is None else numbers[at])
            for at, row in enumerate(request.rows)
        ]
        return assemble(self.index, request, images, size)


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
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self.view = view
        self._requests = _Requests()
        self._loader: DataLoader[Any] | None = loader(
            _StepDataset(index, geometry, seed),
            workers=workers,
            prefetch=prefetch,
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
        data = self._streamed(blocks) if self.streaming else self._indexed(blocks)
        for block in blocks:
            images = [load_image(next(data), self.geometry, None) for _ in range(block.start, block.stop)]
            pixels, valid, failed = stack(self.index, self.view.rows[block.start : block.stop], images, self.geometry.image_size)
            yield DecodedBlock(pixels, torch.arange(block.start, block.stop), valid, failed, block.number)

    def _indexed(self, blocks: list[_Block]) -> Iterator[bytes]:
        reader = ShardReader(self.index)
        for block in blocks:
            for row in self.view.rows[block.start : block.stop]:
                yield reader.read(int(row))
        reader.close()

    def _streamed(self, blocks: list[_Block]) -> Iterator[bytes]:
        """The images of the blocks' rows, by reading their shards from front to back."""
        if not blocks:
            return
        paths = self.index.shard_paths
        urls = [str(paths[shard]) for shard in dict.fromkeys(block.shard for block in blocks)]
        wanted = iter(row_key(int(row)) for row in self.view.rows[blocks[0].start : blocks[-1].stop])
        key = next(wanted, None)
        for sample in _samples(urls):
            if sample["__key__"] == key and "jpg" in sample:
                yield sample["jpg"]
                key = next(wanted, None)
        if key is not None:
            raise InputError(f"row {key} is not in its shard (one of {urls[0]} … {urls[-1]}); {COPY_AGAIN}")


def _samples(urls: list[str]) -> Iterator[dict[str, Any]]:
    try:
        yield from webdataset.WebDataset(
            urls,
            shardshuffle=False,
            seed=0,
            nodesplitter=_unsplit,
            workersplitter=_unsplit,
            select_files=_is_image,
            empty_check=False,
        )
    except (tarfile.TarError, ValueError) as error:  # ValueError: a name twice
        raise InputError(f"{urls[0]} … {urls[-1]}: one cannot be read as a tar file ({shorten(error.args[0])}); {COPY_AGAIN}") from error


def _unsplit(urls: Iterator[dict[str, str]]) -> Iterator[dict[str, str]]:
    return urls


def _is_image(name: str) -> bool:
    return name.endswith(".jpg")


class SequentialBatches:
    """One pass over a view in fixed blocks that do not depend on the number of ranks; every row on exactly one rank.

    Whole shards are streamed through WebDataset where there are enough of them for all workers of all ranks; otherwise blocks are
    read through the index, which one message says. A rank's rows have the places ``bounds`` [start, stop) of the view in
    either case, but with workers they do not arrive in order: ``DecodedBlock.places`` says where each belongs.
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
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        lanes = max(workers, 1)
        blocks = blocks_of(view, block_size)
        shards = list(dict.fromkeys(block.shard for block in blocks))
        self.streaming = len(shards) >= world * lanes
        if not self.streaming and rank == 0:
            _log.info("%s: %d shards are fewer than %d ranks x %d workers; reading through the index", view.name, len(shards), world, lanes)
        first, parts = _by_shard(blocks, shards, rank, world, lanes) if self.streaming else _by_block(blocks, rank, world, lanes)
        self.num_batches = sum(len(part) for part in parts)
        starts = [*(block.start for block in blocks), len(view)]
        self.bounds = (starts[first], starts[first + self.num_batches])
        self._loader = loader(
            _SequentialDataset(index, view, geometry, parts, self.streaming), workers=workers, prefetch=prefetch, pin_memory=pin_memory
        )

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[DecodedBlock]:
        return batches_of(self._loader)


def _by_shard(blocks: list[_Block], shards: list[int], rank: int, world: int, lanes: int) -> tuple[int, list[list[_Block]]]:
    """Whole shards in contiguous runs to ranks and within them to workers: the rank's first block, and its workers' blocks."""
    lane_of = {shard: at * world * lanes // len(shards) for at, shard in enumerate(shards)}
    parts = [[block for block in blocks if lane_of[block.shard] == rank * lanes + lane] for lane in range(lanes)]
    return sum(lane_of[block.shard] < rank * lanes for block in blocks), parts


def _by_block(blocks: list[_Block], rank: int, world: int, lanes: int) -> tuple[int, list[list[_Block]]]:
    """A contiguous balanced run of blocks to each rank, in turn to its workers: the rank's first block, and its workers' blocks."""
    first, stop = len(blocks) * rank // world, len(blocks) * (rank + 1) // world
    return first, [blocks[first + lane : stop : lanes] for lane in range(lanes)]
