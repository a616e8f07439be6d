"""What the tests of embed, search and export share: two trained runs, and the commands in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from dnc_dist import cli
from tests.run_fixtures import dnc, draw_folder, without_report, write_config

CLASSES, PER_CLASS, DIM = 8, 12, 16
BATCH = 16
"""Of the evaluation; a block has 256 images."""
_PLACES: list[Path] = []


def two_runs(factory: pytest.TempPathFactory) -> Path:
    """A folder with ``pictures``, the prepared ``data``, the runs ``one`` and ``two``, and what is made of the first; for all modules."""
    if _PLACES:
        return _PLACES[0]
    folder = factory.mktemp("inference")
    train = {f"train{number}": PER_CLASS for number in range(CLASSES)}
    draw_folder(folder / "pictures", train, {f"test{number}": PER_CLASS for number in range(CLASSES // 2)})
    assert dnc("data", "prepare", "folder", "--root", "pictures", "--out", "data", folder=folder).code == 0
    for name, seed in (("one", 0), ("two", 1)):
        changes = {"run": {"seed": seed}, "schedule": {"epochs": 1}, "evaluation": {"batch_size": BATCH, "nmi": "never"}}
        changes["data"] = {"cache": "cache-of-this-machine"}
        write_config(folder, Path("data"), name, **changes, division={"num_learners": 1, "conquer_from": None})
        done = dnc("train", f"{name}.yaml", folder=folder, before=without_report)
        assert done.code == 0, done
    assert run("embed", folder / "runs/one", folder / "pictures", "--out", folder / "all.parquet", "--nproc", "1") == 0
    assert run("index", folder / "all.parquet", "--out", folder / "all.index") == 0
    _PLACES.append(folder)
    return folder


def run(*arguments: str | Path) -> int:
    """``dnc-dist ARGUMENTS`` in this process: its exit code."""
    return cli.run([str(part) for part in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one message with which wrong input ends."""
    capsys.readouterr()
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") == 1 and "Traceback" not in err
    return err
