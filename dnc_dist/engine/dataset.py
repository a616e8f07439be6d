"""The prepared dataset as the engine uses it: views of the splits, training batches, sequential passes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from torch.distributed import ProcessGroup

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.base.rng import seed_for
from dnc_dist.clustering.division import Division
from dnc_dist.config import RunConfig
from dnc_dist.data.batching import EpochSchedule, epoch_schedule
from dnc_dist.data.images import DECODE_ERRORS, decode
from dnc_dist.data.index import DatasetIndex, RowView, open_index, text, train_view, validation_view
from dnc_dist.data.manifest import read_manifest
from dnc_dist.data.preflight import stream_notes
from dnc_dist.data.remote import Web
from dnc_dist.data.rows import ShardReader
from dnc_dist.data.stream import Batch, SequentialBatches, TrainBatches
from dnc_dist.data.stream_batches import StreamBatches
from dnc_dist.data.stream_plan import stream_schedule
from dnc_dist.data.transforms import Geometry
from dnc_dist.engine import plan
from dnc_dist.engine.state import TrainState
from dnc_dist.processes import distributed
from dnc_dist.processes.cores import loader_processes
from dnc_dist.retrieval.protocols import Columns

_log = logging.getLogger(__name__)
_MUCH = 0.1  # of the images of an epoch
# A folder on this machine's own disk with a copy of data.root; not a key, since the run is the same with and without it.
LOCAL_DATA = "DNC_LOCAL_DATA"


def web_of(cfg: RunConfig) -> Web:
    """How a configuration reads files on web servers."""
    data = cfg.data
    return Web(data.retry_seconds, data.cache.absolute() if data.cache is not None else None, int(data.cache_gb * 1e9))


def open_data(cfg: RunConfig) -> DatasetIndex:
    """The dataset of a configuration, read from this machine's own copy if there is one.

    Raises:
        InputError: one of the two cannot be read, or the copy holds something else.
        RunError: a server does not answer.
    """
    root, web = cfg.data.root, web_of(cfg)
    if not (copy := os.environ.get(LOCAL_DATA)):
        return open_index(root, web)
    index = open_index(Path(copy))
    named = open_index(root, web).content_hash if isinstance(root, str) else read_manifest(root).content_hash
    if index.content_hash != named:
        raise InputError(f"{LOCAL_DATA}={copy} holds another dataset than data.root={root}; copy that one, or unset {LOCAL_DATA}")
    return index


def _decoded(data: bytes) -> Image | None:
    try:
        return decode(data)
    except DECODE_ERRORS:
        return None


def columns_of(index: DatasetIndex, view: RowView) -> Columns:
    """What a retrieval protocol may know of a view.

    Raises:
        InputError: the images have no classes.
    """
    index.check_labelled()

    def sources() -> list[str]:
        return [text(source) for source in index.columns["source"][view.rows]]

    return Columns(view.name, view.labels, view.query, view.gallery, view.lists, sources)


class Passes:
    """The dataset of a configuration, read in passes over views of it.

    Raises:
        InputError: it cannot be read, or differs between ranks.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.index: DatasetIndex = open_data(cfg)
        # The shards, too: what is read from front to back is planned by them.
        hashes = distributed.gather_objects(self.index.manifest.layout_hash)
        if len(set(hashes)) > 1:
            other = next(rank for rank, value in enumerate(hashes) if value != hashes[0])
            raise InputError(
                f"data.root={cfg.data.root} holds other images, or the same in other shards, on rank {other} than on rank 0; "
                "copy the same data set to every machine"
            )
        self.test: RowView | None = self.index.view("test") if "test" in self.index.splits else None
        self._pin_memory = distributed.device().type == "cuda"
        self._workers = loader_processes(cfg.data.workers)

    def sequential(self, view: RowView) -> SequentialBatches:
        """This rank's blocks of one pass over a view, with the evaluation transform."""
        return SequentialBatches(
            self.index,
            view,
            Geometry(None, self.cfg.data.image_size, self.cfg.data.crop),
            block_size=self.cfg.evaluation.batch_size,
            rank=distributed.rank(),
            world=distributed.world_size(),
            workers=self._workers,
            pin_memory=self._pin_memory,
        )

    def thumbnails(self, rows: NDArray[np.int64], side: int, crop: float = 1.0) -> NDArray[np.uint8]:
        """(n..., side, side, 3) pictures of rows of the index; black for -1 and for a row that cannot be decoded."""
        geometry = Geometry(None, side, crop)
        pictures = np.zeros((rows.size, side, side, 3), np.uint8)
        with closing(ShardReader(self.index)) as reader:
            for at, row in enumerate(rows.ravel().tolist()):
                image = _decoded(reader.read(row)) if row >= 0 else None
                if image is not None:
                    pictures[at] = geometry(image).permute(1, 2, 0).numpy()
        return pictures.reshape(*rows.shape, side, side, 3)


class RunData(Passes):
    """Everything that a run reads.

    Raises:
        InputError: the dataset cannot be read, differs between ranks, or has nothing to train on.
    """

    def __init__(self, cfg: RunConfig) -> None:
        super().__init__(cfg)
        if not cfg.evaluation.test:
            self.test = None
        self.train: RowView = train_view(self.index, cfg.data.validation_classes, cfg.run.seed)
        self.validation: RowView | None = validation_view(self.index, cfg.data.validation_classes, cfg.run.seed)
        if self.test is not None:  # wrong roles or lists should not first be met when an epoch is through
            parts.build("protocol", cfg.data.protocol).for_data(columns_of(self.index, self.test))
        self._streams = cfg.data.streams
        if self._streams:
            sizes = {"lanes": cfg.data.lanes, "world": distributed.world_size(), "workers": self._workers}
            for note in distributed.on_main(lambda: list(stream_notes(self.index, self.train, **sizes))):
                _log.info(note)
        self._train_batches: TrainBatches | StreamBatches = (StreamBatches if self._streams else TrainBatches)(
            self.index,
            self.train,
            Geometry(cfg.data.augment, cfg.data.image_size, cfg.data.crop),
            seed=cfg.run.seed,
            workers=self._workers,
            pin_memory=self._pin_memory,
        )

    def new_state(self) -> TrainState:
        """The state of a run that begins with this dataset."""
        data = self.index.manifest
        return TrainState(config_digest=self.cfg.digest(), data_hash=data.content_hash, layout_hash=data.layout_hash)

    def check_same(self, state: TrainState) -> None:
        """Check that a run goes on with the dataset that it began with.

        Raises:
            InputError: it has other images or labels; or, where shards are streamed, other shards.
        """
        root, cure = self.cfg.data.root, "give the old data.root, or set run.name to start another run"
        new = self.new_state()
        if state.data_hash != new.data_hash:
            raise InputError(f"data.root={root} holds other images or labels than the run in {self.cfg.run.path} began with; {cure}")
        if self._streams and state.layout_hash != new.layout_hash:
            raise InputError(
                f"data.root={root} holds the images that the run in {self.cfg.run.path} began with in other shards, and data.access=stream "
                f"makes batches by shards; {cure}"
            )

    def selection_view(self) -> tuple[str, RowView | None]:
        """The split that selects the best checkpoint: ("last" | "validation" | "test", its view).

        Raises:
            InputError: the configuration selects on a split that the dataset does not have.
        """
        wanted = self.cfg.evaluation.select_on
        if wanted == "auto":
            wanted = "validation" if self.validation is not None else "last"
        view = {"last": None, "validation": self.validation, "test": self.test}[wanted]
        if wanted != "last" and view is None:
            raise InputError(f"evaluation.select_on={wanted}, but {self.index.root} has no {wanted} split; set evaluation.select_on=last")
        return wanted, view

    def schedule(self, division: Division, epoch: int, *, conquer: bool) -> EpochSchedule:
        """The steps of an epoch under a division; when conquering, one cluster a step.

        Raises:
            InputError: shards are to be streamed, and no batch can be made of what fits into the pools.
        """
        sch, data = self.cfg.schedule, self.cfg.data
        seed = seed_for(self.cfg.run.seed, "schedule")
        learners_per_step = 1 if conquer else self.cfg.division.learners_per_step
        if not self._streams:
            return epoch_schedule(
                division.learner_of,
                self.train.labels,
                seed=seed,
                epoch=epoch,
                batch_size=sch.batch_size,
                samples_per_class=sch.samples_per_class,
                learners_per_step=learners_per_step,
                length=sch.epoch_length,
                groups=division.groups if division.groups.size else None,
                hard_share=plan.hard_share(self.cfg, epoch),
            )
        planned = stream_schedule(
            division.learner_of,
            self.train.labels,
            self.train.shards,
            np.asarray(self.index.columns["size"][self.train.rows]),
            seed=seed,
            epoch=epoch,
            batch_size=sch.batch_size,
            samples_per_class=sch.samples_per_class,
            learners_per_step=learners_per_step,
            lanes=data.lanes,
            pool_bytes=int(data.pool_mb * 2**20),
        )
        _log.info(f"epoch {epoch}: {planned.summary(distributed.world_size(), sch.batch_size)}")
        if planned.left_over > _MUCH * len(planned.places):
            _log.warning(
                "much is left over; a larger data.pool_mb or fewer data.lanes leave less, data.access=indexed nothing (in a new run)"
            )
        return planned

    def train_batches(self, schedule: EpochSchedule, *, first_step: int, skip: int, group: ProcessGroup | None = None) -> Iterator[Batch]:
        """This rank's batches of an epoch, from step ``skip`` on; ``group`` are the ranks that share its learners, None: all."""
        return self._train_batches.epoch(
            schedule, first_step=first_step, skip=skip, rank=distributed.rank(), world=distributed.world_size(), group=group
        )

    def close(self) -> None:
        """Stop the loader's workers."""
        self._train_batches.close()
