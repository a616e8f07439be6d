"""A rank that keeps the others waiting is named and the run ends; slow ranks change nothing; numbers that are not finite stop a run."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dnc_dist.base.errors import InputError
from dnc_dist.config import ConfigError, load_config
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.finite import _all_finite
from dnc_dist.engine.zero import read_model
from dnc_dist.processes import distributed
from dnc_dist.processes.launch.verdict import Failure, LaunchReport, verdict
from dnc_dist.processes.traces import place as trace
from dnc_dist.processes.traces import remember_sources
from dnc_dist.processes.watchdog import RankReport, Watchdog, diagnose, read
from tests.run_fixtures import Running, assert_same_run, last_step, make_dataset, start, start_ranks, without_report, write_config
from tests.spawn import spawn
from tests.watchdog_hooks import diverging_from, sleeping_in_loader, sleeping_often, waiting_alone

STALL_SECONDS = 3.0
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and the configuration of two short epochs."""
    folder = tmp_path_factory.mktemp("watchdog")
    write_config(
        folder,
        make_dataset(folder),
        division={"num_learners": 2, "conquer_from": None},
        schedule={"epochs": 2},
        evaluation={"nmi": "every"},
        engine={"stall_timeout": STALL_SECONDS, "timeout": 60},
    )
    return folder


_started: list[Running] = []


@pytest.fixture(autouse=True)
def leave_nobody_behind() -> Iterator[None]:
    """A rank that was to end and does not must not stay."""
    yield
    for process in _started:
        if process.alive():
            process.kill()
    _started.clear()


def begin(place: Path, *arguments: str, **options: Any) -> Running:
    """Start a command line that is ended with the test."""
    _started.append(start(arguments, place, **options))
    return _started[-1]


def two_ranks(place: Path, name: str, *changes: str, before: Mapping[int, Callable[[], None]] | None = None) -> list[Running]:
    """A training on two ranks that are ended with the test; ``before`` gives hooks for single ranks."""
    arguments = ["train", "run.yaml", *(part for change in (f"run.name={name}", *changes) for part in ("--set", change))]
    ranks = start_ranks(arguments, place, 2, before=without_report, before_on=before)
    _started.extend(ranks)
    return ranks


def report(rank: int, **values: Any) -> RankReport:
    """A rank that waits in a collective for longer than the limit."""
    usual = {
        "number": 5,
        "host": f"node{rank}",
        "pid": 100 + rank,
        "what": "epoch 3, step 17",
        "key": "engine.stall_timeout",
        "age": 61.0,
        "limit": 60.0,
        "where": "dnc_dist/engine/objective.py:150 _pairwise (all_reduce)",
        "waits": True,
    }
    return RankReport(rank=rank, **(usual | values))


def test_what_others_write_is_read_as_what_it_must_be() -> None:
    mine = report(1, age=2.5)
    assert read(json.dumps(mine).encode(), RankReport) == mine and read(b'[1, "x"]', tuple[int, str]) == (1, "x")  # type: ignore[arg-type]
    for text in (b"", b"5", b"[1]", b"[" * 10_000, b'["1", "x"]', b"\xff", b'[1, "' + b"x" * 70_000 + b'"]'):
        with pytest.raises(InputError, match="what a rank wrote about itself in the store of the ranks is damaged: "):
            read(text, tuple[int, str])  # type: ignore[arg-type]


def test_a_message_from_the_store_cannot_write_to_the_terminal_what_it_likes() -> None:
    heard: list[str] = []
    dog = object.__new__(Watchdog)
    dog._end, dog._rank, dog._tick = lambda text, speak, seconds: heard.append(text), 0, 0.1  # type: ignore[assignment]
    dog._obey(json.dumps([1, "all is well\x1b[2J\nerror: send your password"]).encode())
    assert heard == [r"'all is well\x1b[2J\nerror: send your password'; `--resume auto` goes on from the last checkpoint"]


LOADING = {"where": "dnc_dist/data/stream.py:120 load", "waits": False}


@pytest.mark.parametrize(
    ("reports", "silent", "expected"),
    [
        # A rank that works, within its own limit, is waited for.
        ([report(0), report(1, age=20.0, **LOADING)], [], None),
        ([report(0), report(1, age=61.0, limit=1800.0, key="engine.timeout", **LOADING)], [], None),
        # So is one that waits itself, but not yet for long: it may just have woken up.
        ([report(0), report(1, age=1.0)], [], None),
        (
            [report(0), report(1, **LOADING)],
            [],
            "rank 1 (host node1, pid 101) has been in dnc_dist/data/stream.py:120 load for 61 s, since epoch 3, step 17, and keeps the "
            "other ranks waiting; raise engine.stall_timeout (now 60 s) if that is legitimate",
        ),
        (
            [report(0), report(1), report(2)],
            [1],
            "rank 1 (host node1, pid 101) does not answer; it was last seen in epoch 3, step 17, and keeps the other ranks waiting",
        ),
        (
            [report(rank, **LOADING) for rank in range(5)],
            [],
            "; ".join(
                f"rank {rank} (host node{rank}, pid {100 + rank}) has been in {LOADING['where']} for 61 s, since epoch 3, step 17"
                for rank in range(3)
            )
            + "; and 2 more; raise engine.stall_timeout (now 60 s) if that is legitimate",
        ),
        (
            [report(0), report(1, where="dnc_dist/engine/trainer.py:201 save (barrier)"), report(2)],
            [],
            "all ranks wait for each other: rank 1 (host node1, pid 101) in dnc_dist/engine/trainer.py:201 save (barrier), since "
            "epoch 3, step 17; rank 0 (host node0, pid 100) and 1 more in dnc_dist/engine/objective.py:150 _pairwise (all_reduce), "
            "since epoch 3, step 17; a device or the network between them is stuck",
        ),
    ],
)
def test_who_keeps_the_others_waiting(reports: list[RankReport], silent: list[int], expected: str | None) -> None:
    assert diagnose(reports, silent) == expected


def traced(*calls: tuple[str, str], on_gpu: bool = False) -> tuple[str, bool]:
    """What is said of a thread in which functions of these modules, (module, function), call each other, the last one innermost."""
    call: Callable[[], Any] = lambda: trace(sys._getframe(1), on_gpu)  # noqa: E731
    for module, name in reversed(calls):
        source = f"def {name}(inner):\n    return inner()"
        names: dict[str, Any] = {"__name__": module}
        exec(compile(source, f"/somewhere/{module.replace('.', '/')}.py", "exec"), names)
        call = partial(names[name], call)
    return call()


FIT, STEP = ("dnc_dist.engine.trainer", "fit"), ("dnc_dist.engine.objective", "forward")


@pytest.mark.parametrize(
    ("calls", "on_gpu", "expected"),
    [
        ([FIT, ("dnc_dist.data.stream", "load")], False, ("dnc_dist/data/stream.py:2 load", False)),
        (
            [FIT, ("torch.utils.data.dataloader", "_get_data")],
            True,
            ("dnc_dist/engine/trainer.py:2 fit (torch/utils/data/dataloader.py:2 _get_data)", False),
        ),
        (
            [
                STEP,
                ("dnc_dist.processes.distributed", "any_rank"),
                ("torch.distributed.c10d_logger", "wrapper"),
                ("torch.distributed.distributed_c10d", "all_reduce"),
            ],
            False,
            ("dnc_dist/engine/objective.py:2 forward (all_reduce)", True),
        ),
        ([FIT, ("deepspeed.runtime.engine", "step"), ("deepspeed.comm.comm", "barrier")], False, (".py:2 fit (a collective)", True)),
        ([STEP, ("torch.nn.functional", "conv2d")], False, ("objective.py:2 forward (torch/nn/functional.py:2 conv2d)", False)),
        ([STEP, ("torch.nn.functional", "conv2d")], True, ("objective.py:2 forward (waiting for the GPU)", True)),
        ([STEP, ("torch._inductor.compile_fx", "compile")], True, ("forward (torch/_inductor/compile_fx.py:2 compile)", False)),
        ([("somebody.script", "main")], False, ("script.py:2 main", False)),
    ],
)
def test_where_a_thread_is_and_whether_it_waits(calls: list[tuple[str, str]], on_gpu: bool, expected: tuple[str, bool]) -> None:
    where, waits = traced(*calls, on_gpu=on_gpu)
    assert where.endswith(expected[0]) and waits == expected[1]


def test_reading_from_the_gpu_is_waiting() -> None:
    """``_all_finite`` reads one value of the device; its source is known because ``remember_sources`` was called at the start."""
    remember_sources()
    seen: list[tuple[str, bool]] = []
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, _: seen.append(trace(frame, True)) if frame.f_code is _all_finite.__code__ else None)
    try:
        _all_finite(torch.nn.Linear(2, 2))
    finally:
        sys.setprofile(before)
    assert any(waits and "(waiting for the GPU)" in where for where, waits in seen)


def test_limits_that_contradict_each_other(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine.stall_timeout=90 is longer than engine.timeout=60"):
        load_config(place / "run.yaml", ["engine.stall_timeout=90"])


def ended(rank: Running, seconds: float) -> str:
    """What a rank that failed said."""
    done = rank.wait(seconds)
    assert done.code == 1 and "Traceback" not in done.err, done
    return done.err


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named(stopped: int, place: Path) -> None:
    """Rank 0 holds the store of the ranks when there is no launcher."""
    run = place / "runs" / f"stopped-{stopped}"
    ranks = two_ranks(place, run.name, "schedule.epochs=500", "evaluation.every=500")
    ranks[0].wait_until(lambda: last_step(run) >= 3)
    ranks[stopped].signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        said = ended(ranks[1 - stopped], STALL_SECONDS + 20)
        assert time.monotonic() - began < STALL_SECONDS + 8
        answer = r"does not answer; it was last seen in epoch \d+.*, and keeps the other ranks waiting; `--resume"
        if stopped == 0:
            answer = r"has been in dnc_dist/\S+ .*neither rank 0 nor the store"
        assert re.search(rf"error: rank 1 \(host {HOST}, pid {ranks[1].pid}\) {answer}", said) and said.count("error: ") == 1, said
    finally:
        # A stopped rank that goes on afterwards ends, too.
        ranks[stopped].signal(signal.SIGCONT)
    assert ranks[stopped].wait(30).code != 0


def test_a_sleeping_rank_is_named_with_its_place_in_the_code(place: Path) -> None:
    ranks = two_ranks(place, "sleeping", before={1: partial(sleeping_in_loader, 4, 600.0)})
    said = "".join(ended(one, 60) for one in ranks)
    assert said.count("error: ") == 1
    assert re.search(
        rf"error: rank 1 \(host {HOST}, pid {ranks[1].pid}\) has been in dnc_dist/data/transport.py:\d+ batches_of "
        r"\(tests/watchdog_hooks.py:\d+ slow\) for \d s, since epoch 0, step 4, and keeps the other ranks waiting; raise "
        r"engine.stall_timeout \(now 3 s\) if that is legitimate; `--resume auto` goes on from the last checkpoint\n",
        said,
    ), said


@pytest.mark.slow
def test_ranks_that_wait_for_each_other(place: Path) -> None:
    ranks = two_ranks(place, "apart", before={1: partial(waiting_alone, 4)})
    said = "".join(ended(one, 60) for one in ranks)
    assert said.count("error: ") == 1 and "all ranks wait for each other: " in said
    assert re.search(rf"rank 1 \(host {HOST}, pid {ranks[1].pid}\) in \S+ \S+ \(barrier\), since epoch 0, step 4", said), said
    assert re.search(rf"rank 0 \(host {HOST}, pid {ranks[0].pid}\) in dnc_dist/\S+ \S+ \(\w+\), since epoch 0, step 4", said), said


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> dict[str, Any]:
    """RESULT of the run ``fast``."""
    first, second = two_ranks(place, "fast")
    result = first.wait().result
    assert second.wait().code == 0
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("places", "changes"),
    [(("start", "nmi"), ()), (("step", "save"), ()), (("save",), ("checkpoint.every_steps=3",))],
    ids=["start-nmi", "step-save", "in-the-background"],
)
def test_slow_ranks_change_nothing(places: tuple[str, ...], changes: tuple[str, ...], place: Path, undisturbed: dict[str, Any]) -> None:
    """One rank is late by less than engine.stall_timeout in mid-epoch, and by more where engine.timeout holds; alone or not. A write in
    the background that takes so long is waited for by the next."""
    run = place / "runs" / "-".join(places)
    hook = partial(sleeping_often, 11, 1.0, places, STALL_SECONDS + 0.5)
    first, second = two_ranks(place, run.name, *changes, before={0: hook})
    assert first.wait().result == undisturbed | {"run": f"runs/{run.name}"}
    assert second.wait().code == 0
    assert_same_run(run, place / "runs" / "fast")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_leaves_its_batch(workers: int, place: Path) -> None:
    """Rates beyond all measure in step 6 make a loss that is not finite in step 7; the log looks at it before step 8 is saved."""
    run = place / "runs" / f"diverged-{workers}"
    changes = (
        f"data.workers={workers}",
        "data.augment=color",
        "tracker.log_every=5",
        "checkpoint.every_steps=4",
        "engine.stall_timeout=30",
    )
    ranks = two_ranks(place, run.name, *changes, before=dict.fromkeys(range(2), partial(diverging_from, 5)))
    said = [line for rank in ranks for line in ended(rank, 120).splitlines() if "finite" in line]
    assert len(said) == 1 and re.fullmatch(
        rf"error: step 7 \(epoch 0\) is not finite: the loss is \S+( and \d+ embedding\(s\) are not finite)?; its batch is kept in "
        rf"runs/{run.name}/not-finite/step-00000007-rank-\*.npz; lower optim.lr or .*",
        said[0],
    ), said

    data = RunData(load_config(place / "run.yaml", [f"data.root={place / 'data'}", *changes]))
    weights, state, *_ = read_model(run / "checkpoints" / (run / "checkpoints" / "latest").read_text())
    assert state.step == 4 and all(bool(value.isfinite().all()) for value in weights.values())
    schedule = data.schedule(state.division, 0, conquer=False)
    for rank in range(2):
        batch = next(data._train_batches.epoch(schedule, first_step=0, skip=6, rank=rank, world=2))
        with np.load(run / "not-finite" / f"step-00000007-rank-{rank}.npz") as kept:
            for name in ("images", "labels", "learner", "rows", "slots", "valid"):
                np.testing.assert_array_equal(kept[name], getattr(batch, name).numpy())
            assert kept["keys"].tolist() == [data.index.key(int(row)) for row in batch.rows]
            assert (int(kept["step"]), int(kept["epoch"])) == (7, 0)
    data.close()

    again = two_ranks(place, run.name, *changes, "optim.lr=0.001")
    assert again[0].wait().result["recall@1"] > 0 and again[1].wait().code == 0
    assert last_step(run) == 16


def test_parameters_that_are_not_finite_are_found_behind_a_finite_loss() -> None:
    layer = torch.nn.BatchNorm1d(3)
    assert _all_finite(layer)
    layer.weight.data[1] = 1e30
    assert _all_finite(layer)
    for tensor, value in ((layer.weight.data, float("nan")), (layer.running_var, float("inf"))):
        before = tensor.clone()
        tensor[2] = value
        assert not _all_finite(layer)
        tensor.copy_(before)


def test_the_launcher_shows_no_traceback_of_a_run_error() -> None:
    record = Failure(1.0, 1, "RunError", "rank 1 does not answer", "")
    assert verdict(LaunchReport(codes={0: 1, 1: None}, errors={0: record})) == (1, "error: rank 1 does not answer")


def _late(seconds: float) -> str:
    """Rank 1 enters a collective of a group of its own too late; what rank 0 is told."""
    group = dist.new_group([0, 1])
    distributed.set_timeout(1.0)
    if distributed.rank() == 1:
        time.sleep(seconds)
        return ""
    try:
        distributed.all_reduce_sum(torch.ones(1), group)
    except RuntimeError as error:
        return str(error)
    return "no timeout"


@pytest.mark.slow
def test_the_timeout_reaches_every_group() -> None:
    assert "imed out" in spawn(_late, 2, 4.0)[0]


@pytest.mark.slow
def test_the_launcher_says_it_once(place: Path) -> None:
    run = place / "runs" / "launched"
    changes = (f"run.name={run.name}", "schedule.epochs=500", "evaluation.every=500")
    launcher = begin(place, "launch", "run.yaml", "--nproc", "2", *(part for change in changes for part in ("--set", change)))
    launcher.wait_until(lambda: last_step(run) >= 3)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (worker,) = [int(pid) for pid in children if "RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0")]
    os.kill(worker, signal.SIGSTOP)
    done = launcher.wait(STALL_SECONDS + 30)
    said = [line for line in done.err.splitlines() if "rank" in line]
    assert done.code == 1 and len(said) == 1 and said[0].startswith(f"error: rank 1 (host {HOST}, pid {worker}) does not answer"), done

    done = begin(place, "launch", "run.yaml", "--nproc", "2", "--set", "optim.lr=1e30", "--set", "run.name=once").wait()
    assert done.code == 1 and "Traceback" not in done.err, done
    assert len([line for line in done.err.splitlines() if "is not finite: " in line]) == 1
    assert len(list((place / "runs" / "once" / "not-finite").iterdir())) == 2
