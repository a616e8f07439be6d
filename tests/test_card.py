"""The card of a result: where the code's commit comes from, and that what is no card is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from dnc_dist.base.errors import InputError
from dnc_dist.rundir import METRICS_FILE
from dnc_dist.rundir import card as card_module
from dnc_dist.rundir.card import Card, commit
from dnc_dist.rundir.record import read_run

CARD = Card(
    protocol="leave-one-out",
    parameters={"recall_at": [1, 2]},
    split="test",
    data_hash="abc",
    num_queries=9,
    num_gallery=9,
    num_classes=3,
    queries_left_out=0,
    distance="euclidean",
    dimension=8,
    selected_on="last",
    seed=0,
    version="1",
    commit=None,
    epoch=2,
    checkpoint="step-00000004",
)


def git(*arguments: str | Path, folder: Path) -> str:
    name = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(folder), *name, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the package is said to lie."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "checkout" / "dnc_dist"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("1")
    monkeypatch.setattr(card_module, "_PACKAGE", folder)
    return folder


def test_the_commit_of_a_checkout(package: Path) -> None:
    assert commit.__wrapped__() is None  # no checkout
    top = package.parent
    git("init", folder=top)
    git("add", "dnc_dist", folder=top)
    git("commit", "-m", "one", folder=top)
    git("tag", "-m", "a", "v1", folder=top)
    head = git("rev-parse", "HEAD", folder=top)[:12]
    assert commit.__wrapped__() == head
    (package / "a.py").write_text("2")
    assert commit.__wrapped__() == f"{head}-dirty"


def test_a_package_in_the_checkout_of_something_else_has_no_commit(package: Path) -> None:
    git("init", folder=package.parent.parent)
    assert commit.__wrapped__() is None


def test_without_git_nobody_knows(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(package))
    assert commit.__wrapped__() is None


def test_a_card_is_read_back() -> None:
    assert Card.of(json.loads(json.dumps(CARD.plain())), "run") == CARD


@pytest.mark.parametrize("values", [3, {}, CARD.plain() | {"seed": "0"}, CARD.plain() | {"parameters": []}])
def test_what_is_no_card_is_refused(values: object, tmp_path: Path) -> None:
    line = {"step": 1, "epoch": 1, "kind": "evaluation", "recall@1": 0.5, "card": values}
    (tmp_path / METRICS_FILE).write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl: card is damaged"):
        read_run(tmp_path).card()
