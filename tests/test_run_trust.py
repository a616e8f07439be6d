"""A run directory that somebody else wrote, damaged or removed: nothing is executed, nothing is lost, one message says what is wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import dnc_dist
from dnc_dist.base.arrays import read_tensors
from dnc_dist.base.errors import InputError
from dnc_dist.clustering.division import Division
from dnc_dist.config import load_config
from dnc_dist.engine.state import TrainState
from dnc_dist.engine.zero import read_model
from dnc_dist.model.backbone.conv4 import Conv4
from dnc_dist.rundir import folder as run_folder
from dnc_dist.rundir.checkpoints import Checkpoints
from tests.run_fixtures import (
    Running,
    assert_same_run,
    dnc,
    end_ranks,
    last_step,
    make_dataset,
    metrics,
    start_ranks,
    without_report,
    write_config,
)

STEPS_PER_EPOCH = 8
END = 2 * STEPS_PER_EPOCH
MODEL = "mp_rank_00_model_states.pt"
OPTIMIZER = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, the configuration of two short epochs, and the run ``whole`` of it."""
    folder = tmp_path_factory.mktemp("trust")
    make_dataset(folder)
    write_config(
        folder,
        Path("data"),
        division={"num_learners": 2, "conquer_from": None},
        schedule={"epochs": 2},
        evaluation={"select_on": "test"},
        checkpoint={"keep": 9},
    )
    done = dnc("train", "run.yaml", *change("run.name=whole"), folder=folder, before=without_report)
    (folder / "result.json").write_text(json.dumps(done.result))
    return folder


def change(*pairs: str) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


def copy(place: Path, name: str) -> Path:
    """A copy of the run ``whole`` under another name, which also its configuration gives."""
    run = place / "runs" / name
    shutil.copytree(place / "runs" / "whole", run)
    return run


def train(place: Path, name: str, *arguments: str, world: int = 1, before: Callable[[], None] = without_report) -> list[Running]:
    """Start so many ranks of a run, as srun does it."""
    return start_ranks(["train", "run.yaml", *change(f"run.name={name}"), *arguments], place, world, before=before)


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def sign(folder: Path) -> None:
    """Make the list of a checkpoint's files right again, as whoever writes a checkpoint can."""
    files = [path for path in folder.iterdir() if path.name != "files.json"]
    entries = {path.name: [path.stat().st_size, zlib.crc32(path.read_bytes())] for path in files}
    (folder / "files.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_nothing_of_a_foreign_checkpoint_is_executed(name: str, place: Path) -> None:
    run, mark = copy(place, f"bomb-{name}"), place / f"executed-{name}"
    for folder in (run / "checkpoints").glob("step-*"):
        # Beside what belongs there: a reader that takes what it needs would never miss anything.
        content = torch.load(folder / name, weights_only=True)
        torch.save(content | {"more": _Bomb(mark)}, folder / name)
        sign(folder)
    said = f"{name} holds something else than tensors, numbers and text; it could run code and is not read"
    for world in (1, 2):
        error = end_ranks(train(place, run.name, *change("schedule.epochs=3"), world=world)).error
        assert said in error and "\n" not in error
    if name == MODEL:
        assert said in dnc("evaluate", f"runs/{run.name}", folder=place).error
    assert not mark.exists()


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints/latest", "checkpoints/best", "checkpoints/step-00000016/files.json"])
def test_nothing_of_another_file_of_a_run_is_executed(name: str, place: Path) -> None:
    run, mark = copy(place, f"pickle-{Path(name).name}"), place / "executed"
    buffer = io.BytesIO()
    torch.save(_Bomb(mark), buffer)
    (run / name).write_bytes(buffer.getvalue())
    done = dnc("evaluate", f"runs/{run.name}", "--checkpoint", "best" if name.endswith("best") else "last", folder=place)
    # A pointer or list that is damaged leaves the other checkpoints.
    assert done.code in (0, 2) and "Traceback" not in done.err and name.split("/")[-1] in done.err, done
    assert not mark.exists()


def test_a_division_with_code_is_not_one(place: Path, tmp_path: Path) -> None:
    with np.load(place / "runs" / "whole" / "divisions" / "epoch-0001.npz") as arrays:
        content: dict[str, Any] = dict(arrays)
    for changes, message in (
        ({"sizes": np.array([_Bomb(tmp_path / "executed")], dtype=object)}, "is damaged"),
        ({"num_learners": np.int64(3)}, "its division contradicts itself"),
        ({"learner_of": content["learner_of"] + 2}, "its division contradicts itself"),
        ({"epoch": np.float64(1)}, "epoch is an array of float64 with 0 dimension"),
    ):
        np.savez(tmp_path / "division.npz", **{**content, **changes})
        with pytest.raises(InputError, match=message):
            Division.load(tmp_path / "division.npz")
    assert not (tmp_path / "executed").exists()


def test_tensors_that_are_not_what_they_should_be(place: Path, tmp_path: Path) -> None:
    """Each with a right list of files: whoever can write one of them can write the other."""
    whole = place / "runs" / "whole" / "checkpoints" / "step-00000016"
    content = torch.load(whole / MODEL, weights_only=True)
    state = content["train_state"]
    for changes, message in (
        ({"module": 3}, "holds no weights"),
        ({"world_size": "2"}, "is no checkpoint of a run"),
        ({"train_state": None}, "holds no train state of this version"),
        ({"train_state": state | {"json": '{"epoch": "x"}'}}, "epoch: Input should be a valid integer"),
        ({"train_state": state | {"json": "[" * 100_000}}, "is damaged"),
        ({"train_state": state | {"division": {**state["division"], "sizes": 3.0}}}, "sizes is an array of float64"),
        ({"more": torch.ones(1).expand(1 << 40)}, "a sparse, quantized or expanded tensor"),
        ({"more": torch.ones(2, device="meta")}, "a sparse, quantized or expanded tensor"),
    ):
        folder = tmp_path / "checkpoints" / "step-00000016"
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        torch.save(content | changes, folder / MODEL)
        with pytest.raises(InputError, match=message) as caught:
            read_model(tmp_path / "checkpoints" / "step-00000016")
        assert MODEL in str(caught.value)
    (tmp_path / "zeros").write_bytes(bytes(100))
    with pytest.raises(InputError, match="zeros holds something else than tensors"):
        read_tensors(tmp_path / "zeros")


def test_weights_of_another_model(place: Path) -> None:
    run = copy(place, "other")
    folder = max((run / "checkpoints").glob("step-*"))
    content = torch.load(folder / MODEL, weights_only=True)
    content["module"]["head.linear.weight"] = torch.zeros(3)
    torch.save(content, folder / MODEL)
    sign(folder)
    for done in (
        dnc("evaluate", "runs/other", "--checkpoint", "last", folder=place),
        end_ranks(train(place, "other", *change("schedule.epochs=3"))),
    ):
        assert "head.linear.weight has shape (3,)" in done.error


def test_a_train_state_survives_its_checkpoint() -> None:
    best = {"epoch": 1, "samples_seen": 3, "metrics": {"recall@1": 0.1 + 0.2, "protocol": "auto", "num_queries": 1 << 40}}
    state = TrainState(epoch=2, best=best, tracker_run_id="abc")  # type: ignore[arg-type]
    assert TrainState.from_state_dict(state.state_dict()) == state


@pytest.mark.parametrize("name", ["epoch", "step", "batches_done", "samples_seen"])
@pytest.mark.parametrize("count", [-1, 10**8])
def test_counts_that_no_training_has(name: str, count: int) -> None:
    state = TrainState(**{name: count})  # type: ignore[arg-type]
    if count > 0 and name != "step":
        assert TrainState.from_state_dict(state.state_dict()) == state
        return
    with pytest.raises(InputError, match="is damaged: it counts"):
        TrainState.from_state_dict(state.state_dict())


@pytest.mark.parametrize("name", ["../../../../etc/passwd", "/etc/passwd", "..", ""])
def test_a_list_of_files_names_only_its_own(name: str, place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000016"
    shutil.copytree(place / "runs" / "whole" / "checkpoints" / "step-00000016", folder)
    (folder / "files.json").write_text(json.dumps({name: [1, 2]}))
    with pytest.raises(InputError, match=r"files\.json names .*, which is not in this folder"):
        Checkpoints(tmp_path, 1).find("latest")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"step-00000099", b"../whole", b"step-00000016\nstep-00000008", None])
def test_a_damaged_pointer_costs_nothing(content: bytes | None, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "runs" / "whole" / "checkpoints", tmp_path / "checkpoints")
    latest = tmp_path / "checkpoints" / "latest"
    latest.unlink()
    if content is None:
        latest.mkdir()
    else:
        latest.write_bytes(content)
    checkpoints = Checkpoints(tmp_path, 1)
    assert checkpoints.find("latest") == ("step-00000016", [f"{latest} names no checkpoint that is there; the newest whole one is used"])
    (tmp_path / "checkpoints" / "step-00000016" / MODEL).write_bytes(b"")
    tag, messages = checkpoints.find("latest") or ("", [])
    assert tag == "step-00000008" and len(messages) == 2


def test_a_valid_pointer_still_excludes_what_was_abandoned(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "runs" / "whole" / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "latest").write_text("step-00000008")
    assert Checkpoints(tmp_path, 1).find("latest") == ("step-00000008", [])


def test_the_user_is_told_of_a_damaged_pointer(place: Path) -> None:
    run = copy(place, "pointer")
    (run / "checkpoints" / "latest").write_text("")
    done = end_ranks(train(place, "pointer"))
    assert "latest names no checkpoint that is there; the newest whole one is used\n" in done.out
    assert done.result | {"run": "runs/whole"} == json.loads((place / "result.json").read_text())


def test_copies_of_the_user_stay(place: Path) -> None:
    run = copy(place, "copies")
    folder = run / "checkpoints"
    kept = [folder / name for name in ("step-00000008-paper", "step-8", ".step-mine", "steps", "step-00000012.bak")]
    for path in kept:
        shutil.copytree(folder / "step-00000008", path)
    (folder / ".step-00000099.tmp").mkdir()
    done = end_ranks(train(place, "copies", *change("checkpoint.keep=2", "schedule.epochs=3", "evaluation.select_on=last")))
    assert done.code == 0 and all((path / MODEL).is_file() for path in kept)
    # The copies take no place, and what a crash left is gone.
    assert {path.name for path in folder.glob("*step-*")} >= {"step-00000016", "step-00000024"}
    assert not (folder / ".step-00000099.tmp").exists()


def test_a_checkpoint_that_was_not_finished_is_none(tmp_path: Path) -> None:
    """A run that has no other one begins, so it needs its initial weights."""
    folder = tmp_path / "checkpoints"
    (folder / ".step-00000010.tmp").mkdir(parents=True)
    assert Checkpoints(tmp_path, 1).empty()
    (folder / ".step-00000010.old").mkdir()
    assert not Checkpoints(tmp_path, 1).empty()


def test_a_full_disk_at_the_start_does_not_take_the_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(place / "run.yaml", ["run.name=unlucky", f"run.dir={place / 'runs'}", f"data.root={place / 'data'}"])

    def full(path: Path, text: str) -> None:
        path.with_name(f".{path.name}.0123456789abcdef.part").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_text", full)
        with pytest.raises(InputError, match="cannot be written"):
            run_folder.RunDirectory(cfg.run.path).prepare(cfg, "auto")
    assert run_folder.RunDirectory(cfg.run.path).prepare(cfg, "auto") == "" and (cfg.run.path / "config.yaml").is_file()


def test_a_run_without_its_checkpoints_is_not_overwritten(place: Path) -> None:
    run = copy(place, "bare")
    shutil.rmtree(run / "checkpoints")
    before = {path: path.read_bytes() for path in (run / "metrics.jsonl", run / "config.yaml")}
    for resume, message in (("never", "already holds a run"), ("auto", "holds a run that came to epoch 1, but none of its checkpoints")):
        assert message in end_ranks(train(place, "bare", "--resume", resume)).error
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_ended_before_its_first_checkpoint_starts_over(place: Path) -> None:
    (young,) = train(place, "young")
    run = place / "runs" / "young"
    young.wait_until(lambda: last_step(run) >= 2)
    young.kill()
    assert "already holds a run" in end_ranks(train(place, "young", "--resume", "never")).error
    done = end_ranks(train(place, "young"))
    assert "runs/young holds a run that ended before its first checkpoint; it starts over\n" in done.out
    assert_same_run(run, place / "runs" / "whole")


def removed_in_step(what: str, step: int) -> None:
    """For ``before``: rank 0 removes a folder of the run after so many steps."""
    without_report()
    from dnc_dist.engine import trainer
    from dnc_dist.processes import distributed

    log = trainer.StepLog.step

    def logging(self: Any, *args: Any) -> None:
        if args[0] == step and distributed.is_main():
            shutil.rmtree(self.guard.run_dir.path / what)
        log(self, *args)

    trainer.StepLog.step = logging  # type: ignore[method-assign]


@pytest.mark.parametrize(("what", "world"), [(".", 1), (".", 2), ("checkpoints", 1)])
def test_a_run_directory_that_is_removed_ends_the_run(what: str, world: int, place: Path) -> None:
    name = f"removed-{world}-{what.strip('.')}"
    done = end_ranks(train(place, name, world=world, before=partial(removed_in_step, what, 3)))
    assert done.code == 1 and "Traceback" not in done.err, done
    last = done.err.splitlines()[-1]
    assert last.startswith(f"error: runs/{name} was removed, or its checkpoints were, while the run was training in it; nothing more")


def breaking_gradient(step: int, rank: int) -> None:
    """For ``before``: on one rank a gradient of this step (counted from 1) is infinite; its loss is not."""
    without_report()
    from dnc_dist.engine import trainer
    from dnc_dist.processes import distributed

    build, steps = trainer.build_engine, []

    def building(objective: Any, cfg: Any) -> Any:
        engine = build(objective, cfg)
        if distributed.rank() == rank:
            objective.head.linear.bias.register_hook(lambda grad: grad + float("inf") if steps[-1] == step else grad)
        forward = engine.forward
        engine.forward = lambda *args, **options: (steps.append(len(steps) + 1), forward(*args, **options))[1]
        return engine

    trainer.build_engine = building


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_gradient_that_is_not_finite_ends_the_run(zero: int, place: Path) -> None:
    """With a line only every 5 steps, and on the other rank than the one that speaks."""
    name = f"gradient-{zero}"
    changes = change(f"engine.zero={zero}", "tracker.log_every=5", "checkpoint.every_steps=2")
    done = end_ranks(train(place, name, *changes, world=2, before=partial(breaking_gradient, 3, 1)))
    assert done.code == 1, done
    last = done.err.splitlines()[-1]
    assert last.startswith("error: step 3 (epoch 0) is not finite: its loss is 0.") and ", but the gradient of it is not finite; " in last
    assert len(list((place / "runs" / name / "not-finite").glob("step-00000003-rank-*.npz"))) == 2
    # It must not reach a checkpoint.
    assert [path.name for path in (place / "runs" / name / "checkpoints").glob("step-*")] == ["step-00000002"]


def killed_in_last_evaluation(epoch: int) -> None:
    """For ``before``: the process group is killed when the last epoch has been evaluated, but is not saved yet."""
    without_report()
    from dnc_dist.engine import trainer

    evaluate = trainer.Trainer.evaluate

    def evaluating(self: Any) -> Any:
        found = evaluate(self)
        if self.state.epoch == epoch:
            os.killpg(0, signal.SIGKILL)
        return found

    trainer.Trainer.evaluate = evaluating  # type: ignore[method-assign]


def test_the_last_evaluation_cannot_cost_the_last_epoch(place: Path) -> None:
    run = place / "runs" / "late"
    (late,) = train(place, "late", before=partial(killed_in_last_evaluation, 1))
    assert late.wait().code == -signal.SIGKILL
    assert (run / "checkpoints" / "latest").read_text() == f"step-{END:08d}"
    done = end_ranks(train(place, "late"))
    assert f"resumed in epoch 1, after step {END}\n" in done.out
    assert done.result | {"run": "runs/whole"} == json.loads((place / "result.json").read_text())
    assert_same_run(run, place / "runs" / "whole")


def slow_nmi(seconds: float) -> None:
    """For ``before``: the k-means of NMI takes so long, but goes on."""
    without_report()
    import time

    from dnc_dist.engine import evaluate

    kmeans = evaluate.kmeans

    def slow(*args: Any, beat: Callable[[], None], **options: Any) -> Any:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            beat()
            time.sleep(0.5)
        return kmeans(*args, beat=beat, **options)

    evaluate.kmeans = slow


@pytest.mark.slow
def test_nmi_may_take_longer_than_the_ranks_wait(place: Path) -> None:
    """The ranks' limit is 20 s, that of their process groups 60 s more."""
    changes = change("engine.timeout=20", "engine.stall_timeout=20", "schedule.epochs=1")
    done = end_ranks(train(place, "nmi", *changes, world=2, before=partial(slow_nmi, 100.0)))
    assert done.result["nmi"] > 0


def test_a_trained_run_needs_no_initial_weights(place: Path) -> None:
    torch.save(Conv4(Conv4.Options(), pretrained=False).state_dict(), place / "initial.pth")
    arguments = change("model.weights=initial.pth", "model.batch_norm=auto", "schedule.epochs=1")
    assert end_ranks(train(place, "initial", *arguments)).code == 0
    (place / "initial.pth").unlink()
    found = json.loads(dnc("evaluate", "runs/initial", "--json", folder=place).out)
    assert found["recall@1"] == metrics(place / "runs" / "initial", "evaluation")[-1]["recall@1"]
    assert end_ranks(train(place, "initial", *arguments[:-1], "schedule.epochs=2")).code == 0
    assert last_step(place / "runs" / "initial") == END
    assert "model.weights=initial.pth does not exist" in end_ranks(train(place, "again", *arguments)).error
    assert not (place / "runs" / "again").exists()


def test_a_run_can_be_read_from_anywhere(place: Path) -> None:
    run = place / "runs" / "whole"
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["data"]["root"] == str(place / "data") and written["run"]["dir"] == str(place / "runs")
    found = [
        json.loads(dnc("evaluate", path, "--json", folder=folder).out) for path, folder in ((".", run), ("../runs/whole", place / "data"))
    ]
    assert found[0]["recall@1"] == found[1]["recall@1"] == json.loads((place / "result.json").read_text())["recall@1"]
    assert dnc("report", ".", folder=run).code == 0 and "<title>whole" in (run / "report.html").read_text()


def test_statistics_that_nobody_measured_are_not_frozen(place: Path) -> None:
    error = end_ranks(train(place, "frozen", *change("model.batch_norm=frozen"))).error
    assert "model.batch_norm=frozen" in error and "set model.batch_norm to auto or global" in error
    assert not (place / "runs" / "frozen").exists()


def test_no_reader_unpickles() -> None:
    """What a checkpoint of a foreign run would need to run code."""
    package = Path(dnc_dist.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for call in ("weights_only=False", "allow_pickle=True", "pickle.load", ".load_checkpoint("):
            assert call not in text, f"{path}: {call}"
