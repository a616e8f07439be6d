"""Loaders: the same pixels on any number of ranks, resuming by one number, every row once in a sequential pass."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dnc_dist.data.batching import EpochSchedule, epoch_schedule
from dnc_dist.data.index import DatasetIndex, open_index, train_view
from dnc_dist.data.loading import Batch, DecodedBlock
from dnc_dist.data.readers import Reading, Sample
from dnc_dist.data.rows import ShardReader
from dnc_dist.data.shards import write_shards
from dnc_dist.data.stream import SequentialBatches, TrainBatches
from dnc_dist.data.transforms import Geometry

SIZE = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    samples = []
    for name in range(9):
        for number in range(2 + name % 4):
            buffer = io.BytesIO()
            pixels = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((20, 20)).save(buffer, "JPEG")
            samples.append(Sample(f"c{name}", "test" if name > 5 else "train", f"c{name}/{number}", data=buffer.getvalue()))
    out = tmp_path_factory.mktemp("data") / "out"
    write_shards(Reading("random", samples, {}), out)
    return out


@pytest.fixture
def index(root: Path) -> DatasetIndex:
    return open_index(root)


@pytest.fixture
def schedule(index: DatasetIndex) -> EpochSchedule:
    view = index.view("train")
    return epoch_schedule(np.arange(len(view)) % 2, view.labels, seed=0, epoch=0, batch_size=8, samples_per_class=2, learners_per_step=2)


def batches(index: DatasetIndex, schedule: EpochSchedule, world: int = 1, rank: int = 0, workers: int = 0, skip: int = 0) -> list[Batch]:
    loader = TrainBatches(index, index.view("train"), Geometry("standard", SIZE), seed=0, workers=workers)
    try:
        return list(loader.epoch(schedule, first_step=100, skip=skip, rank=rank, world=world))
    finally:
        loader.close()


def assert_equal(one: Batch | DecodedBlock, other: Batch | DecodedBlock) -> None:
    for name, left, right in zip(one._fields, one, other, strict=True):
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, name


def joined(parts: list[Batch]) -> Batch:
    """The global batch of a step from those of its ranks, without dummies."""
    real = [part.rows >= 0 for part in parts]
    tensors = [torch.cat([part[at][keep] for part, keep in zip(parts, real, strict=True)]) for at in range(6)]
    for rank, part in enumerate(parts):  # consecutive ranks share a learner, or all share all
        assert part.rows_of_ranks[rank % len(part.rows_of_ranks)] == len(part.rows)
        assert part.rows_of_world == [len(other.rows) for other in parts]
    failed = sorted(key for part in parts for key in part.failed)
    first, count = parts[0], [len(tensors[0])]
    return Batch(*tensors, failed, first.step, count, max_positives=first.max_positives, rows_of_world=count)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [2, 3, 4, 12])
def test_same_pixels_on_any_number_of_ranks(index: DatasetIndex, schedule: EpochSchedule, world: int) -> None:
    alone = batches(index, schedule)
    ranks = [batches(index, schedule, world, rank) for rank in range(world)]
    assert [batch.step for batch in alone] == list(range(100, 100 + len(schedule)))
    for number, whole in enumerate(alone):
        assert_equal(joined([rank[number] for rank in ranks]), whole)
        assert torch.equal(whole.slots, torch.arange(len(whole.rows)))
    if world == 12:  # more ranks than rows: some carry a dummy
        dummies = [rank[0] for rank in ranks if not rank[0].valid.any()]
        assert dummies
        assert [int(value) for value in dummies[0][1:6]] == [0, -1, -1, 0, 0]


def test_three_rows_on_four_ranks(index: DatasetIndex) -> None:
    view = index.view("train")
    learner_of = np.full(len(view), -1)
    learner_of[:3] = 0
    schedule = epoch_schedule(learner_of, view.labels, seed=0, epoch=0, batch_size=8, samples_per_class=2)
    ranks = [batches(index, schedule, 4, rank) for rank in range(4)]
    assert sum(int(rank[0].valid.sum()) for rank in ranks) == 3
    assert all(len(rank) == len(schedule) and len(rank[0].rows) >= 1 for rank in ranks)
    assert_equal(joined([rank[0] for rank in ranks]), batches(index, schedule)[0])


def test_resume_is_one_number(index: DatasetIndex, schedule: EpochSchedule) -> None:
    whole = batches(index, schedule, workers=2)
    for one, other in zip(batches(index, schedule, workers=0), whole, strict=True):
        assert_equal(one, other)
    rest = batches(index, schedule, workers=2, skip=1)
    assert len(rest) == len(whole) - 1
    for one, other in zip(rest, whole[1:], strict=True):
        assert_equal(one, other)


def test_workers_serve_several_epochs_and_abandoned_ones(index: DatasetIndex, schedule: EpochSchedule) -> None:
    expected = batches(index, schedule)
    before = torch.random.get_rng_state()
    loader = TrainBatches(index, index.view("train"), Geometry("standard", SIZE), seed=0, workers=2)
    next(loader.epoch(schedule, first_step=0))
    for _ in range(2):
        for one, other in zip(loader.epoch(schedule, first_step=100), expected, strict=True):
            assert_equal(one, other)
    loader.close()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_pixels_depend_on_the_step(index: DatasetIndex, schedule: EpochSchedule) -> None:
    loader = TrainBatches(index, index.view("train"), Geometry("standard", SIZE), seed=0)
    first, second = next(loader.epoch(schedule, first_step=0)), next(loader.epoch(schedule, first_step=1))
    assert torch.equal(first.rows, second.rows)
    assert not torch.equal(first.images, second.images)


@pytest.fixture
def damaged(index: DatasetIndex, root: Path, tmp_path: Path) -> tuple[DatasetIndex, int]:
    """The data set with one training image overwritten (its size is unchanged), and that image's row."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in root.iterdir():
        (copy / path.name).symlink_to(path)
    row = 3
    shard = index.shard_paths[index.columns["shard"][row]]
    data = bytearray(shard.read_bytes())
    start = int(index.columns["offset"][row])
    data[start : start + int(index.columns["size"][row])] = b"x" * int(index.columns["size"][row])
    (copy / shard.name).unlink()
    (copy / shard.name).write_bytes(data)
    return open_index(copy), row


def test_damaged_row_is_skipped_on_any_number_of_ranks(damaged: tuple[DatasetIndex, int], schedule: EpochSchedule) -> None:
    index, row = damaged
    alone = batches(index, schedule)
    failed = [batch for batch in alone if batch.failed]
    assert failed
    for batch in failed:
        assert batch.failed == [index.key(row)]
        at = batch.rows == row
        assert batch.valid.tolist() == (~at).tolist()
        assert batch.learner[at].tolist() == [-1]
        assert int(batch.images[at].sum()) == 0
    for world in (2, 4):
        ranks = [batches(index, schedule, world, rank) for rank in range(world)]
        for number, whole in enumerate(alone):
            assert_equal(joined([rank[number] for rank in ranks]), whole)
    passed = list(SequentialBatches(index, index.view("train"), Geometry(None, SIZE), block_size=4))
    assert [key for block in passed for key in block.failed] == [index.key(row)]


def test_bugs_are_not_swallowed(index: DatasetIndex, schedule: EpochSchedule) -> None:
    class Broken(Geometry):
        def __call__(self, image: Image.Image, uniforms: torch.Tensor | None = None) -> torch.Tensor:
            raise ValueError("a bug in the geometry")

    loader = TrainBatches(index, index.view("train"), Broken("none", SIZE), seed=0)
    with pytest.raises(ValueError, match="a bug"):
        next(loader.epoch(schedule, first_step=0))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("split", ["train", "held out"])
def test_sequential_pass_has_every_row_once(index: DatasetIndex, split: str, world: int, workers: int) -> None:
    view = train_view(index, 0.35) if split == "held out" else index.view(split)
    geometry = Geometry(None, SIZE)
    reader = ShardReader(index)
    alone = {block.number: block for block in SequentialBatches(index, view, geometry, block_size=3)}
    seen: list[int] = []
    blocks: list[int] = []
    for rank in range(world):
        loader = SequentialBatches(index, view, geometry, block_size=3, rank=rank, world=world, workers=workers)
        mine: list[int] = []
        arrived = list(loader)
        assert len(arrived) == len(loader)
        for block in arrived:
            assert_equal(block, alone[block.number])  # blocks do not depend on ranks or workers
            assert block.valid.all()
            mine += block.places.tolist()
            blocks.append(block.number)
        assert sorted(mine) == list(range(*loader.bounds))
        assert loader.bounds[0] == len(seen)
        seen += sorted(mine)
    assert seen == list(range(len(view)))
    assert sorted(blocks) == list(range(len(alone)))
    for block in alone.values():
        for place, image in zip(block.places.tolist(), block.images, strict=True):
            with Image.open(io.BytesIO(reader.read(int(view.rows[place])))) as opened:
                assert torch.equal(image, geometry(opened.convert("RGB")))


def test_streaming_equals_index_reads(index: DatasetIndex, caplog: pytest.LogCaptureFixture) -> None:
    view = index.view("train")
    streamed = SequentialBatches(index, view, Geometry(None, SIZE), block_size=3, world=6)
    assert streamed.streaming
    with caplog.at_level(logging.INFO):
        ranks = [SequentialBatches(index, view, Geometry(None, SIZE), block_size=3, rank=rank, world=7) for rank in range(7)]
    assert not any(loader.streaming for loader in ranks)
    assert [record.message for record in caplog.records] == [
        "train: 6 shards are fewer than 7 ranks x 1 workers; reading through the index"
    ]
    by_index = {block.number: block for loader in ranks for block in loader}
    for block in SequentialBatches(index, view, Geometry(None, SIZE), block_size=3):
        assert_equal(block, by_index[block.number])


def test_batch_moves(index: DatasetIndex, schedule: EpochSchedule) -> None:
    batch = batches(index, schedule)[0]
    assert_equal(batch.to("cpu"), batch)
