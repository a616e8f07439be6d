"""What the tests of whole runs share: a tiny dataset and configuration, the command line as real processes, and what a run left behind.

``start`` forks the command line from a server that has imported everything once: real processes with their own exit codes,
signals and output, without the seconds that an import of torch and DeepSpeed takes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.process_server import SERVER
from tests.rounding import move_weights
from tests.spawn import free_port

SIZE = 16
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Values that two runs may not share: how long things took, and how much memory they needed.
_OF_THE_CLOCK = ("seconds", "images_per_second", "share_data", "share_divide", "share_evaluate", "memory_mb")


@dataclass(frozen=True)
class Done:
    """How a process ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The values of the RESULT line, the last one on stdout."""
        assert self.code == 0, self
        last = self.out.splitlines()[-1]
        assert last.startswith("RESULT "), self.out
        return json.loads(last.removeprefix("RESULT "))

    @property
    def error(self) -> str:
        """The one message with which wrong input ends."""
        assert self.code == 2, self
        assert "Traceback" not in self.err + self.out, self.err
        assert self.err.startswith("error: ") and self.err.count("error: ") == 1, self.err
        return self.err.removeprefix("error: ").rstrip("\n")


class Running:
    """A command line that runs in its own process group."""

    def __init__(self, process: BaseProcess, out: Path, err: Path) -> None:
        self._process, self._out, self._err = process, out, err

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def alive(self) -> bool:
        return self._process.is_alive()

    def wait(self, timeout: float = 240) -> Done:
        self._process.join(timeout)
        if self._process.is_alive():
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self._err.read_text()}")
        code = self._process.exitcode
        assert code is not None
        return Done(code, self._out.read_text(), self._err.read_text())

    def kill(self) -> None:
        """SIGKILL to the process and all it started, as a machine that goes down does."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own yet, and so has started nothing
            self._process.kill()
        self._process.join()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait_until(self, condition: Callable[[], Any]) -> None:
        """Wait for something that the process does; it must not end before."""
        wait_until(lambda: condition() or not self.alive())
        assert self.alive(), self.wait()


def wait_until(condition: Callable[[], Any], timeout: float = 180) -> None:
    """Wait until something is true.

    Raises:
        AssertionError: it is not after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def _main(arguments: list[str], folder: str, out: str, err: str, environment: dict[str, str], before: Callable[[], None] | None) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.update(environment, PYTHONUNBUFFERED="1")
    for name in (*_RANK_VARIABLES, "WANDB_MODE", "WANDB_API_KEY", "DNC_KERNELS"):
        if name not in environment:
            os.environ.pop(name, None)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for number, name in ((1, out), (2, err)):
        target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, number)
        os.close(target)
    # The server's own were opened before; the console of a user is line-buffered or better.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    # Not that of the tests, which somebody may have started under `nohup`.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if before is not None:
        before()
    from dnc_dist.cli import main

    main()


def _entry(arguments: list[str], *rest: Any) -> None:
    sys.argv = ["dnc-dist", *arguments]
    _main(arguments, *rest)


def start(
    arguments: Sequence[str | Path], folder: Path, *, env: Mapping[str, str] | None = None, before: Callable[[], None] | None = None
) -> Running:
    """Start ``dnc-dist ARGUMENTS`` in a folder; ``before`` (a module-level function) is called first in that process."""
    count = len(list(folder.glob(".std-*.out")))
    out, err = folder / f".std-{count}.out", folder / f".std-{count}.err"
    out.touch()
    err.touch()
    process = SERVER.Process(
        target=_entry, args=([str(part) for part in arguments], str(folder), str(out), str(err), dict(env or {}), before)
    )
    process.start()
    return Running(process, out, err)


def dnc(*arguments: str | Path, folder: Path, timeout: float = 240, **options: Any) -> Done:
    """Run ``dnc-dist ARGUMENTS`` in a folder to its end."""
    return start(arguments, folder, **options).wait(timeout)


def start_ranks(
    arguments: Sequence[str | Path],
    folder: Path,
    world: int,
    *,
    before: Callable[[], None] | None = None,
    before_on: Mapping[int, Callable[[], None]] | None = None,
) -> list[Running]:
    """Start ``dnc-dist ARGUMENTS`` as so many ranks, as srun does it: a launcher would have each import torch and DeepSpeed anew.

    ``before_on`` gives single ranks another ``before``.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    return [
        start(arguments, folder, env={"RANK": str(rank), "LOCAL_RANK": str(rank), **address}, before=(before_on or {}).get(rank, before))
        for rank in range(world)
    ]


def end_ranks(processes: Sequence[Running], timeout: float = 240) -> Done:
    """How rank 0 ended; all ranks end with the same code."""
    done = [process.wait(timeout) for process in processes]
    assert len({each.code for each in done}) == 1, done
    return done[0]


def without_report() -> None:
    """For ``before``: a training that does not draw its report, which takes longer than the training."""
    import dnc_dist.report

    dnc_dist.report.build_report = lambda run_dir: run_dir / "report.html"


def on_a_smooth_network(before: Callable[[], None], *, neighbour: bool = False) -> None:
    """For ``before``: runs that differ by rounding stay close to each other (see ``rounding.py``); another ``before`` comes after."""
    from dnc_dist.doctor.harness import smooth
    from dnc_dist.model.backbone.conv4 import Conv4

    init = Conv4.__init__

    def made(self: Conv4, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        smooth(self)
        if neighbour:
            move_weights(self)

    Conv4.__init__ = made  # type: ignore[method-assign]
    before()


def killed_when_writing(name: str, tag: str) -> None:
    """For ``before``: the process group is killed just before the pointer or list of files of this name is written for a checkpoint."""
    from dnc_dist.rundir import checkpoints as checkpoint

    write = checkpoint.write_text

    def writing(path: Path, text: str) -> None:
        if path.name == name and tag in f"{path.parent.name} {text}":
            os.killpg(0, signal.SIGKILL)
        write(path, text)

    checkpoint.write_text = writing


def with_small_files(limit: int) -> None:
    """For ``before``: no file may grow beyond so many bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def signalled_in(phase: str, step: int, number: signal.Signals) -> None:
    """For ``before``: the process gets the signal when ``trainer.phase`` begins at this step."""
    without_report()
    from dnc_dist.engine import trainer

    function = getattr(trainer.Trainer, phase)

    def signalled(self: Any, *args: Any) -> Any:
        if self.state.step == step:
            os.kill(os.getpid(), number)
        return function(self, *args)

    setattr(trainer.Trainer, phase, signalled)


def draw_folder(place: Path, train: Mapping[str, int], test: Mapping[str, int], seed: int = 5) -> Path:
    """``place/split/class/n.png``: noisy 16 px patterns, so many of each class."""
    generator = np.random.default_rng(seed)
    for split, classes in (("train", train), ("test", test)):
        for name, count in classes.items():
            pattern = generator.uniform(40, 215, (4, 4, 3)).repeat(4, 0).repeat(4, 1)
            (place / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = (pattern + generator.normal(0, 40, pattern.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / split / name / f"{number}.png")
    return place


def make_dataset(place: Path, classes: int = 16, per_class: int = 8, seed: int = 5, shards: int = 64) -> Path:
    """A prepared dataset: so many training classes, half as many for testing."""
    from dnc_dist.data.readers import read
    from dnc_dist.data.shards import write_shards

    train = {f"train{number:02d}": per_class for number in range(classes)}
    test = {f"test{number:02d}": 6 for number in range(classes // 2)}
    write_shards(read("folder", draw_folder(place / "pictures", train, test, seed)), place / "data", shards=shards)
    shutil.rmtree(place / "pictures")
    return place / "data"


_GLYPHS: list[tuple[Path, Done, Done]] = []


def glyphs_on_two_processes(factory: pytest.TempPathFactory) -> tuple[Path, Done, Done]:
    """A folder with prepared characters, ``run.yaml`` and what ``launch --nproc 2`` left of it (made once for all modules).

    Returns:
        The folder, and how ``data prepare`` and ``launch`` ended.
    """
    if _GLYPHS:
        return _GLYPHS[0]
    folder = factory.mktemp("glyphs")
    prepared = dnc("data", "prepare", "glyphs", "--classes", "60", "--image-size", "16", "--out", "glyphs", folder=folder)
    write_config(
        folder,
        Path("glyphs"),
        data={"workers": 1},
        schedule={"batch_size": 32},
        engine={"zero": 1},
        evaluation={"at_start": True},
        checkpoint={"every_steps": 3},
        tracker={"kind": "wandb"},
    )
    _GLYPHS.append((folder, prepared, dnc("launch", "run.yaml", "--nproc", "2", folder=folder)))
    return _GLYPHS[0]


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A tree with the values of another one put over it."""
    return {**tree, **{name: merged(tree.get(name, {}), value) if isinstance(value, Mapping) else value for name, value in changes.items()}}


def write_config(folder: Path, root: Path, name: str = "run", **sections: Mapping[str, Any]) -> Path:
    """A YAML file for four quick epochs of 1, 2, 4, 4 learners and a conquer phase; ``sections`` are put over it."""
    tree = {
        "run": {"dir": "runs"},
        "data": {"root": str(root), "image_size": SIZE, "crop": 1.0, "augment": "light", "workers": 0},
        "model": {"backbone": "conv4", "weights": "none", "embedding_dim": 16, "batch_norm": "global", "dropout": 0.1},
        "division": {"num_learners": 4, "every": 1, "conquer_from": 3, "backbone_frozen_epochs": 0},
        "schedule": {"epochs": 4, "batch_size": 16, "samples_per_class": 4, "decay": "cosine"},
        "optim": {"lr": 0.003, "mask_lr_mult": 10},
        "evaluation": {"recall_at": [1, 2]},
        "tracker": {"kind": "jsonl", "log_every": 1},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(merged(tree, sections)))
    return path


def metrics(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The complete lines of ``metrics.jsonl``; of one kind, if given."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def last_step(run: Path) -> int:
    """The newest step in ``metrics.jsonl``."""
    return max((line["step"] for line in metrics(run, "train")), default=0)


def timeless(run: Path) -> list[dict[str, Any]]:
    """All lines of ``metrics.jsonl`` without what depends on the clock: equal runs have equal ones, in the same order."""
    return [{name: value for name, value in line.items() if name not in _OF_THE_CLOCK} for line in metrics(run)]


def divisions(run: Path) -> dict[str, dict[str, Any]]:
    """The content of each division file."""
    found = {}
    for path in sorted((run / "divisions").iterdir()):
        with np.load(path, allow_pickle=False) as file:
            found[path.name] = {name: file[name].tolist() for name in file.files}
    return found


def assert_same_run(run: Path, reference: Path) -> None:
    """Bit for bit the same curve (every step once) and the same divisions."""
    assert timeless(run) == timeless(reference)
    assert divisions(run) == divisions(reference)
    lines = [(line["kind"], line["step"], line["epoch"]) for line in metrics(run)]
    assert len(lines) == len(set(lines))
