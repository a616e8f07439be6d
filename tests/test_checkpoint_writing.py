"""Checkpoints that are written while training goes on: of exactly one step, published by all ranks or not at all, never lost in silence.

Writers wait here until the test lets them go on, so nothing depends on which thread is faster.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dnc_dist.base.errors import RunError
from dnc_dist.clustering.division import whole
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.setup import build_engine, build_objective
from dnc_dist.engine.state import TrainState
from dnc_dist.engine.zero import checkpoint, prepare_checkpoint
from dnc_dist.engine.zero.layout import MODEL
from dnc_dist.processes import distributed
from dnc_dist.processes.transfer import EndToEnd, Snapshot
from dnc_dist.rundir.checkpoints import Checkpoints, tag_of
from dnc_dist.rundir.writing import CheckpointWriter
from tests.engine_fixtures import config, division_by_hand
from tests.engine_fixtures import make_dataset as make_tiny_dataset
from tests.run_fixtures import (
    wait_until,
)
from tests.spawn import spawn
from tests.test_engine_plain import LEARNERS, take_steps

FIRST, SECOND, END = 3, 6, 8


@contextmanager
def held_writers(let_go: threading.Event) -> Iterator[None]:
    """Inside, threads wait with their files until they may go on."""
    write = checkpoint._write

    def held(*args: Any) -> list[Path]:
        if threading.current_thread() is not threading.main_thread():
            assert let_go.wait(60)
        return write(*args)

    with mock.patch.object(checkpoint, "_write", held):
        yield


def flat(values: Any, place: str = "") -> dict[str, Any]:
    """The leaves of a tree by where they are."""
    if isinstance(values, dict):
        pairs: Any = values.items()
    elif isinstance(values, list | tuple):
        pairs = enumerate(values)
    else:
        return {place: values}
    return {name: leaf for key, value in pairs for name, leaf in flat(value, f"{place}/{key}").items()}


def content(folder: Path) -> dict[str, Any]:
    """All leaves of all files of a checkpoint."""
    return {name: leaf for path in folder.glob("*.pt") for name, leaf in flat(torch.load(path, weights_only=True), path.name).items()}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    assert one.keys() == other.keys()
    return [
        name
        for name, value in one.items()
        if not (torch.equal(value, other[name]) and value.dtype == other[name].dtype if isinstance(value, Tensor) else value == other[name])
    ]


class Found(NamedTuple):
    differing: dict[int, list[str]]
    """By step: where the checkpoint that was written in the background is not the one that training waited for."""
    moved: list[str]
    """What changed between the two steps."""
    early: list[str]
    """Checkpoints that were published while the writers were held."""


def written_both_ways(root: str, place: str, zero: int) -> Found:
    """Two checkpoints of one training, each written twice; training goes on while those in the background are written."""
    cfg = config(
        Path(root),
        Path(place) / "run",
        engine={"zero": zero},
        loss={"name": "margin", "learn_beta": "class", "memory": 48, "memory_from": 0},
    )
    data = RunData(cfg)
    engine = build_engine(build_objective(cfg, data.train.num_classes).train(), cfg)
    state = TrainState(division=division_by_hand(data.train.labels, LEARNERS), metrics={"recall@1": 0.0})
    waited = CheckpointWriter(Checkpoints(Path(place) / f"waited-{zero}", keep=9))
    background = CheckpointWriter(Checkpoints(Path(place) / f"background-{zero}", keep=9))
    prepare, early = partial(prepare_checkpoint, engine, state), []
    distributed.barrier()
    for start, step, after in ((0, FIRST, SECOND), (SECOND, SECOND, END)):
        take_steps(engine, data, range(start, step))
        state.step = state.metrics["recall@1"] = step
        waited.save(step, prepare)
        let_go = threading.Event()
        with held_writers(let_go):
            background.save(step, prepare, background=True)
            take_steps(engine, data, range(step, after))
            state.step = state.metrics["recall@1"] = after
            assert state.division is not None
            state.division.learner_of[:] = 0
            state.division = whole(data.train.labels, epoch=step)
            early += [tag for tag in background.checkpoints.tags() if tag == tag_of(step)]
            let_go.set()
            background.finish()
    found = {
        step: [content(writer.checkpoints.folder / writer.checkpoints.find(tag_of(step))[0]) for writer in (waited, background)]  # type: ignore[index]
        for step in (FIRST, SECOND)
    }
    return Found(
        {step: differing(*both) for step, both in found.items()},
        [name for name, value in found[FIRST][0].items() if isinstance(value, Tensor) and not torch.equal(value, found[SECOND][0][name])]
        if found[FIRST][0].keys() == found[SECOND][0].keys()
        else ["other names"],
        early,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_it_is_the_checkpoint_that_training_would_have_waited_for(world: int, zero: int, tiny: Path, tmp_path: Path) -> None:
    """Every tensor and number of every file: weights, running statistics, memory of the loss, moments, counts of steps, division."""
    for found in spawn(written_both_ways, world, str(tiny), str(tmp_path), zero):
        assert found.differing == {FIRST: [], SECOND: []}
        assert found.early == []
        for part in ("running_mean", "num_batches_tracked", "loss.memory", "exp_avg_sq", "/step", "learner_of"):
            assert any(part in name for name in found.moved), part


class Small:
    """A checkpoint of one tensor, by one process."""

    def __init__(self, place: Path) -> None:
        self.value = torch.zeros(1000)
        self.writer = CheckpointWriter(Checkpoints(place, keep=9))
        self.folder = self.writer.checkpoints.folder

    def prepare(self, folder: Path, tag: str, snapshot: Snapshot | None) -> Callable[[], list[Path]]:
        files = {MODEL: {"value": self.value}}
        return partial(checkpoint._write, folder / tag, snapshot.take(files) if snapshot is not None else files)

    def save(self, step: int, *, background: bool = False) -> None:
        self.value.fill_(step)
        self.writer.save(step, self.prepare, background=background)

    def published(self) -> dict[int, float]:
        """The values by step."""
        tags = self.writer.checkpoints.tags()
        return {int(tag[5:]): float(torch.load(self.folder / tag / MODEL, weights_only=True)["value"].unique()) for tag in tags}


def no_space(*args: Any, **options: Any) -> list[Path]:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


NO_SPACE = r"step-00000002 cannot be written \(No space left on device\), \d+ MB are free there; `--resume auto` goes on later"


def test_one_is_in_flight_at_most(tmp_path: Path) -> None:
    """The next one waits for it, and has its own values."""
    small, let_go = Small(tmp_path), threading.Event()
    with held_writers(let_go):
        small.save(1, background=True)
        second = threading.Thread(target=small.save, args=(2,), kwargs={"background": True})
        second.start()
        second.join(0.2)
        assert second.is_alive() and small.published() == {}
        let_go.set()
        second.join(60)
        small.save(3)
    assert small.published() == {1: 1.0, 2: 2.0, 3: 3.0}
    assert (small.folder / "latest").read_text() == "step-00000003"


def test_the_same_step_is_saved_again_after_the_one_in_flight(tmp_path: Path) -> None:
    """As when a run is stopped right after it."""
    small, let_go = Small(tmp_path), threading.Event()
    with held_writers(let_go):
        small.save(1, background=True)
        threading.Timer(0.1, let_go.set).start()
        small.value.fill_(7)
        small.writer.save(1, small.prepare)
    assert small.published() == {1: 7.0}
    assert sorted(path.name for path in small.folder.iterdir()) == ["latest", "step-00000001"]


@pytest.mark.parametrize("how", ["save", "finish", "close"])
def test_a_write_that_fails_is_never_silent(how: str, tmp_path: Path) -> None:
    small = Small(tmp_path)
    small.save(1)
    with mock.patch.object(checkpoint, "_write", no_space):
        small.save(2, background=True)
    wait_until(lambda: small.writer.failed)
    calls: dict[str, Callable[[], None]] = {
        "save": lambda: small.save(3),
        "finish": small.writer.finish,
        "close": small.writer.close,
    }
    with pytest.raises(RunError, match=NO_SPACE):
        calls[how]()
    assert small.published() == {1: 1.0} and (small.folder / "latest").read_text() == "step-00000001"


def test_a_write_that_fails_in_our_own_code_keeps_its_error(tmp_path: Path) -> None:
    small = Small(tmp_path)
    with mock.patch.object(checkpoint, "_write", mock.Mock(side_effect=AssertionError)):
        small.save(1, background=True)
    with pytest.raises(AssertionError):
        small.writer.finish()
    assert small.published() == {}


def test_publishing_that_fails_is_told(tmp_path: Path) -> None:
    small, let_go = Small(tmp_path), threading.Event()
    with held_writers(let_go), mock.patch.object(Checkpoints, "publish", no_space):
        small.save(2, background=True)
        let_go.set()
        with pytest.raises(RunError, match=NO_SPACE):
            small.writer.finish()


def test_the_end_of_a_run_waits_for_the_one_in_flight(tmp_path: Path) -> None:
    small, let_go = Small(tmp_path), threading.Event()
    with held_writers(let_go):
        small.save(1, background=True)
        threading.Timer(0.1, let_go.set).start()
        small.writer.close()
    assert small.published() == {1: 1.0}
    assert not any(thread.name.startswith("checkpoint") for thread in threading.enumerate())


def saved_by_one_of_two(place: str) -> tuple[list[str], bool]:
    """What is published when rank 1 never writes, and whether rank 0's thread has ended."""
    from dnc_dist.rundir import writing

    writing._LAST_SECONDS = 0.2
    small = Small(Path(place))
    with held_writers(threading.Event()) if distributed.rank() == 1 else mock.patch.object(writing, "_TICK_SECONDS", 0.01):
        small.save(1, background=True)
        distributed.barrier()
        if distributed.is_main():
            small.writer.close()
    return small.writer.checkpoints.tags(), not any(thread.name.startswith("checkpoint") for thread in threading.enumerate())


def test_nothing_is_published_that_a_rank_has_not_written(tmp_path: Path) -> None:
    assert spawn(saved_by_one_of_two, 2, str(tmp_path))[0] == ([], True)


def test_a_snapshot_uses_its_memory_again() -> None:
    """Also for vectors of several tensors; what has changed its shape gets new memory, and what is gone is freed."""
    snapshot = Snapshot()
    image = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    network = nn.BatchNorm1d(2)

    def tree(rows: int) -> dict[str, Any]:
        return {
            "network": network.state_dict(),
            "image": image,
            "vector": EndToEnd([image, nn.Parameter(torch.ones(3))]),
            "rows": [torch.full((rows,), 2)],
            "text": "x",
        }

    first = snapshot.take(tree(2))
    assert torch.equal(first["vector"], torch.cat([torch.arange(24.0), torch.ones(3)]))
    assert first["image"].stride() == image.stride() and torch.equal(first["image"], image)
    assert first["network"]._metadata == network.state_dict()._metadata  # type: ignore[attr-defined]
    image.mul_(2)
    assert float(first["image"].max()) == 23
    second = snapshot.take(tree(3))
    assert second["image"] is first["image"] and second["vector"] is first["vector"] and second["text"] == "x"
    assert second["rows"][0].tolist() == [2, 2, 2] and first["rows"][0].tolist() == [2, 2]
    snapshot.take({"image": image})
    assert list(snapshot._memory) == [("image",)]


@pytest.mark.gpu
def test_a_snapshot_of_a_gpu_is_of_the_moment_it_was_taken() -> None:
    """The device is busy, and what is asked of it afterwards changes the tensors."""
    snapshot = Snapshot()
    values = torch.zeros(10_000_000, device="cuda")
    for number in range(3):
        torch.cuda._sleep(50_000_000)
        values.fill_(number)
        copied = snapshot.take({"one": values, "vector": EndToEnd([values[:5], values[5:9].view(2, 2)])})
        values.fill_(-1)
        snapshot.wait()
        assert copied["one"].is_pinned() and copied["vector"].is_pinned()
        assert float(copied["one"].min()) == float(copied["one"].max()) == number
        assert copied["vector"].tolist() == [number] * 9
