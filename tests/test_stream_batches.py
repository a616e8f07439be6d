"""Batches from shards that are read from front to back: the plan's rows, the same pixels as by the index, whoever reads; and whole runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dnc_dist.base.errors import InputError
from dnc_dist.config import load_config
from dnc_dist.data.index import DatasetIndex, open_index
from dnc_dist.data.loading import Batch
from dnc_dist.data.rows import ShardReader
from dnc_dist.data.segments import read_rows, segments_of
from dnc_dist.data.stream import TrainBatches
from dnc_dist.data.stream_batches import LaneReader, StreamBatches
from dnc_dist.data.stream_plan import StreamSchedule, stream_schedule
from dnc_dist.data.transforms import Geometry
from tests.run_fixtures import (
    SIZE,
    Running,
    assert_same_run,
    dnc,
    end_ranks,
    last_step,
    make_dataset,
    metrics,
    start,
    start_ranks,
    without_report,
    write_config,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset of 20 training classes with 9 images, a shard for each."""
    folder = tmp_path_factory.mktemp("stream")
    make_dataset(folder, classes=20, per_class=9)
    return folder


@pytest.fixture(scope="module")
def index(place: Path) -> DatasetIndex:
    return open_index(place / "data")


def plan_of(index: DatasetIndex, **changes: int) -> StreamSchedule:
    view = index.view("train")
    options = {"seed": 0, "epoch": 0, "batch_size": 16, "samples_per_class": 4, "lanes": 8, "pool_bytes": 200_000} | changes
    learner_of = view.labels % 2
    return stream_schedule(learner_of, view.labels, view.shards, index.columns["size"][view.rows], **options)  # type: ignore[arg-type]


def batches(index: DatasetIndex, plan: StreamSchedule, rank: int = 0, world: int = 1, workers: int = 0, skip: int = 0) -> list[Batch]:
    loader = StreamBatches(index, index.view("train"), Geometry("standard", SIZE), seed=0, workers=workers)
    return list(loader.epoch(plan, first_step=100, skip=skip, rank=rank, world=world))


def assert_same_step(parts: list[Batch], whole: Batch) -> None:
    """The ranks' parts are the whole, dummies left away."""
    for part in parts:
        assert part.step == whole.step and part.max_positives == whole.max_positives
        assert part.rows_of_world == [len(other.rows) for other in parts]
    with_rows = [part for part in parts if (part.rows >= 0).any()]
    assert all(bool((part.rows >= 0).all()) for part in with_rows)
    for at, name in enumerate(Batch._fields[:6]):
        assert torch.equal(torch.cat([part[at] for part in with_rows]), whole[at]), name


def test_the_same_pixels_as_by_the_index(index: DatasetIndex) -> None:
    """The plan is a schedule: read by offset it gives the very batches."""
    plan = plan_of(index)
    by_offset = TrainBatches(index, index.view("train"), Geometry("standard", SIZE), seed=0)
    streamed = batches(index, plan)
    assert len(streamed) == len(plan) > 5
    for one, other in zip(streamed, by_offset.epoch(plan, first_step=100), strict=True):
        assert_same_step([one], other)
        assert torch.equal(one.slots, torch.arange(len(one.rows))) and one.rows_of_ranks == other.rows_of_ranks


@pytest.mark.parametrize(("world", "workers", "m"), [(1, 2, 1), (2, 1, 2), (3, 0, 1), (8, 0, 2)])
def test_ranks_and_workers_change_nothing(index: DatasetIndex, world: int, workers: int, m: int) -> None:
    plan = plan_of(index, learners_per_step=m)
    alone = batches(index, plan)
    ranks = [batches(index, plan, rank, world, workers) for rank in range(world)]
    for number, whole in enumerate(alone):
        assert_same_step([rank[number] for rank in ranks], whole)


def test_a_resume_reads_only_what_is_still_needed(index: DatasetIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(index)
    whole = batches(index, plan)
    opened: list[tuple[int, int]] = []
    shards = type(index.shards)
    original = shards.open

    def counted(self: object, shard: int, start: int, stop: int) -> object:
        opened.append((shard, stop - start))
        return original(self, shard, start, stop)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "open", counted)
    skip = len(plan) - 2
    for one, other in zip(batches(index, plan, skip=skip), whole[skip:], strict=True):
        assert_same_step([one], other)
    rows = index.view("train").rows[plan.places[plan.starts[skip] :]]
    assert {shard for shard, _ in opened} == set(index.columns["shard"][rows].tolist())
    shards_of = index.columns["shard"][rows]
    spans = {
        shard: np.ptp(index.columns["offset"][rows[shards_of == shard]]) + index.columns["size"][rows].max() + 1024
        for shard in set(shards_of.tolist())
    }
    assert all(size <= spans[shard] for shard, size in opened)


def test_a_lane_is_read_as_far_as_is_asked(index: DatasetIndex) -> None:
    rows = index.view("train").rows[:20]
    reader, by_offset = LaneReader(index, rows), ShardReader(index)
    assert reader.take(int(rows[3])) == by_offset.read(int(rows[3]))
    assert sorted(reader.waiting) == rows[:3].tolist()
    assert [reader.take(int(row)) for row in rows[:3]] == [by_offset.read(int(row)) for row in rows[:3]]
    assert reader.waiting == {}


def test_rows_in_any_order_of_shards(index: DatasetIndex) -> None:
    view, by_offset = index.view("train"), ShardReader(index)
    rows = np.concatenate([view.rows[view.shards == shard][::2] for shard in (7, 2, 5)])
    assert list(read_rows(index, rows)) == [by_offset.read(int(row)) for row in rows]
    assert [segment.shard for segment in segments_of(index, rows)] == [7, 2, 5]
    assert list(read_rows(index, rows[:0])) == []


def test_a_shard_that_changed_under_way_is_named(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    index = open_index(tmp_path / "data")
    rows, path = index.view("train").rows, index.shard_paths[3]
    content = path.read_bytes()
    path.write_bytes(content.replace(f"{int(rows[27]):09d}".encode(), b"900000000"))
    with pytest.raises(InputError, match=r"cannot be read as a tar file|is not in \S+train-000003\.tar"):
        list(read_rows(index, rows))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"train-000003\.tar"):
        list(read_rows(index, rows))


def train(place: Path, name: str, nproc: int, *arguments: str) -> Running:
    return start(["launch", "run.yaml", "--nproc", str(nproc), "--set", f"run.name={name}", *arguments], place, before=without_report)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_in_mid_epoch_and_resumed_and_on_other_ranks(place: Path) -> None:
    """kill -9 of a run on two processes; it goes on to the same curve bit for bit, and on one process to the same batches."""
    streaming = {"access": "stream", "lanes": 8, "pool_mb": 0.1}
    write_config(
        place,
        place / "data",
        data=streaming,
        schedule={"epochs": 3},
        division={"conquer_from": None},
        checkpoint={"every_steps": 3, "keep": 2},
    )
    result = train(place, "whole", 2, "--set", "checkpoint.keep=50").wait(900).result
    lines = metrics(place / "runs" / "whole", "epoch")
    used = [line["samples_seen"] for line in lines]
    divisions = [line for line in metrics(place / "runs" / "whole", "division")]
    for number, line in enumerate(lines):
        seen = used[number] - (used[number - 1] if number else 0)
        left_out = max((d for d in divisions if d["epoch"] <= number), key=lambda d: d["epoch"])["left_out"]
        assert seen + line["left_over_images"] + left_out == 20 * 9

    killed = train(place, "killed", 2)
    killed.wait_until(lambda: last_step(place / "runs" / "killed") >= 16)
    killed.kill()
    again = train(place, "killed", 2).wait(900)
    assert again.result | {"run": "runs/whole"} == result | {"run": "runs/whole"}
    assert_same_run(place / "runs" / "killed", place / "runs" / "whole")

    # From the middle of the first epoch on, by one process.
    shutil.copytree(place / "runs" / "whole", place / "runs" / "other")
    done = train(place, "other", 1, "--resume", "runs/other/checkpoints/step-00000003").wait(900)
    assert done.result["samples_seen"] == result["samples_seen"]
    one, other = (metrics(place / "runs" / name, "train") for name in ("other", "whole"))
    assert [line["step"] for line in one] == [line["step"] for line in other]
    assert one[3]["loss"] == pytest.approx(other[3]["loss"], rel=1e-5)  # the same batch; after that, rounding grows


def test_a_run_that_streams(place: Path) -> None:
    """Two processes with groups of one for each learner; what is said of each epoch; wrong configurations."""
    data = {"access": "stream", "lanes": 8, "pool_mb": 1.0}
    write_config(place, place / "data", "short", data=data, schedule={"epochs": 3}, division={"conquer_from": None, "learners_per_step": 2})
    done = end_ranks(start_ranks(["train", "short.yaml"], place, 2, before=without_report))
    assert done.result["epoch"] == 3
    assert "epoch 0: " in done.out and " fit into none; " in done.out
    # The same images, of which a streaming run makes other batches.
    make_dataset(place / "other", classes=20, per_class=9, shards=10)
    assert open_index(place / "other" / "data").content_hash == open_index(place / "data").content_hash
    error = dnc("train", "short.yaml", "--set", "data.root=other/data", folder=place).error
    assert "data.root=other/data holds the images that the run in runs/short began with in other shards" in error
    for override, message in {
        "data.lanes=1": r"data\.lanes=1 is less than division\.learners_per_step=2",
        "schedule.epoch_length=over": r"data\.access=stream reads each once; use schedule\.epoch_length=dataset",
        "data.root=http://localhost/data data.retry_seconds=700": r"data\.retry_seconds=700 must be less than engine\.stall_timeout=600",
    }.items():
        with pytest.raises(InputError, match=message):
            load_config(place / "short.yaml", override.split())
