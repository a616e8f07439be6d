"""Files of every kind that may come from elsewhere, damaged in every way: a command ends with a message and an exit code, executes
nothing of them, and does not hang."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dnc_dist import cli
from dnc_dist.base.errors import InputError
from dnc_dist.clustering.division import Division, whole
from dnc_dist.rundir.diagnosis import save_diagnosis
from dnc_dist.rundir.gallery import PictureGallery, save_gallery
from dnc_dist.rundir.maps import EmbeddingMap, save_map
from tests.diagnosis_fixtures import make_diagnosis
from tests.test_card import CARD

SECONDS, SLOW_SECONDS = 1.0, 17.0
"""For each kind of file: 10 seconds in all of ``make test``, three minutes in all of ``make test-full``."""
ODD = [
    b"null",
    b"true",
    b"-1",
    b"1e400",
    b"NaN",
    b"9" * 400,
    b'""',
    b'"\\ud800"',
    b"[]",
    b"{}",
    b"[" * 3000,
    b'"<script>"',
    b"2024-02-20",
    b"\0",
]
CANARY = "canary-fired"
# What would make a file of this name, if something executed it.
ODD += [
    b"!!python/object/apply:pathlib.Path.touch [canary-fired]",
    b"!!python/object/apply:os.system ['touch canary-fired']",
    b"cposix\nsystem\n(S'touch canary-fired'\ntR.",
]
_VALUE = re.compile(rb'"[^"\n]*"|[-+.0-9a-zA-Z]+')


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[str, float, float, bytes]]:
    """What happens to a file: kinds of damage, each at a place and of a length (shares of the whole), with new bytes."""
    share = st.floats(0, 1, exclude_max=True)
    kind = st.sampled_from(["flip", "cut", "double", "insert", "replace", "replace", "replace"])
    return draw(st.lists(st.tuples(kind, share, share, st.sampled_from(ODD) | st.binary(max_size=20)), min_size=1, max_size=4))


def damaged(content: bytes, what: list[tuple[str, float, float, bytes]]) -> bytes:
    """The file after all of it."""
    for kind, place, length, new in what:
        at = int(place * len(content))
        end = at + int(length**4 * (len(content) - at))
        if kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ (1 << int(length * 8))]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at] + content[end + 1 :]
        elif kind == "double":
            content = content[:end] + content[at:]
        elif kind == "insert":
            content = content[:at] + new + content[at:]
        elif kind == "replace" and (found := _VALUE.search(content, at)):
            content = content[: found.start()] + new + content[found.end() :]
    return content


def make_run(folder: Path) -> Path:
    """A run directory with every file that a command reads, as far as commands can know without its data."""
    run = folder / "run"
    (run / "checkpoints" / "step-00000008").mkdir(parents=True)
    lines = [
        {"step": 0, "epoch": 0, "kind": "division", "num_learners": 2, "sizes": [4, 4], "left_out": 0, "matched_share": 1.0},
        {"step": 4, "epoch": 0, "kind": "train", "loss": 0.5, "lr/embedding": 0.1, "learner_loss/0": 0.5, "learner_loss/1": 0.25},
        {"step": 8, "epoch": 1, "kind": "evaluation", "recall@1": 0.5, "num_queries": 8, "protocol": "leave-one-out", "card": CARD.plain()},
        {"step": 8, "epoch": 0, "kind": "epoch", "seconds": 3.5, "share_data": 0.25},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree = {
        "run": {"dir": "runs", "name": "run", "seed": 3},
        "data": {"root": "data", "image_size": 16},
        "model": {"backbone": "conv4", "weights": "none"},
        "evaluation": {"recall_at": [1, 2], "at_start": False},
        "optim": {"lr": 0.01},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    rows, labels = np.arange(6).reshape(2, 3), np.zeros((2, 3), np.int64)
    pictures = np.zeros((2, 3, 8, 8, 3), np.uint8)
    save_gallery(run, PictureGallery(rows[:, 0], rows, labels[:, 0], labels, rows.astype(np.float32), {0: "a"}, pictures[:, 0], pictures))
    save_diagnosis(run, make_diagnosis())
    save_map(run, 8, EmbeddingMap(2000 + np.arange(25), np.zeros((25, 2), np.float32), np.zeros(2, np.float32)))
    whole(np.zeros(8, np.int64)).save(run / "division.npz")
    (run / "checkpoints" / "latest").write_text("step-00000008\n")
    (run / "checkpoints" / "step-00000008" / "files.json").write_text('{"mp_rank_00_model_states.pt": [4, 1716781343]}')
    (run / "checkpoints" / "step-00000008" / "mp_rank_00_model_states.pt").write_bytes(b"none")
    return run


def read_division(path: Path) -> int:
    """What a command that reads a division would make of it."""
    try:
        Division.load(path)
    except InputError:
        return 2
    return 0


def command(*arguments: str) -> Callable[[Path], int]:
    """A command line about a run directory or a file in it."""
    return lambda path: cli.run([*arguments, str(path if path.is_file() and arguments[0] == "config" else path.parent)])


def evaluate(path: Path) -> int:
    """Measure the run that a file below its checkpoints belongs to."""
    return cli.run(["evaluate", str(next(parent for parent in path.parents if (parent / "config.yaml").exists()))])


KINDS: dict[str, tuple[str, Callable[[Path], int]]] = {
    "metrics of a report": ("metrics.jsonl", command("report")),
    "configuration of a report": ("config.yaml", command("report")),
    "gallery of a report": ("gallery.npz", command("report")),
    "map of a report": ("maps/step-00000008.npz", lambda path: cli.run(["report", str(path.parent.parent)])),
    "diagnosis of a report": ("diagnosis.npz", command("report")),
    "metrics of a comparison": ("metrics.jsonl", command("compare")),
    "configuration of a comparison": ("config.yaml", command("compare")),
    "configuration": ("config.yaml", command("config")),
    "configuration of an evaluation": ("config.yaml", evaluate),
    "pointer to the latest checkpoint": ("checkpoints/latest", evaluate),
    "files of a checkpoint": ("checkpoints/step-00000008/files.json", evaluate),
    "division": ("division.npz", read_division),
}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seconds", [SECONDS, pytest.param(SLOW_SECONDS, marks=pytest.mark.slow)], ids=["short", "long"])
def test_damaged_files(
    kind: str, seconds: float, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, act = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    path, content = run / name, (run / name).read_bytes()
    deadline = time.monotonic() + seconds
    counts = {0: 0, 1: 0, 2: 0}

    # Nothing is shrunk: the message shows the bytes.
    @settings(max_examples=5, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(damages())
    def once(what: list[tuple[str, float, float, bytes]]) -> None:
        bad = damaged(content, what)
        path.write_bytes(bad)
        try:
            code = act(path)
        except Exception as error:
            raise AssertionError(f"{name} with {bad!r}: {type(error).__name__}: {error}") from error
        out, err = capsys.readouterr()
        assert code in counts and "Traceback" not in err + out, (bad, err)
        assert code == 0 or act is read_division or err.startswith("error: "), (bad, err)
        assert not list(tmp_path.rglob(f"*{CANARY}*")), bad
        counts[code] += 1

    while time.monotonic() < deadline:
        once()
    path.write_bytes(content)
    assert sum(counts.values()) > 0
    assert os.getcwd() == str(tmp_path)
