"""``dnc-dist data`` as a user meets it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from dnc_dist.base.errors import InputError
from dnc_dist.commands.data import data


def make_folder(root: Path) -> Path:
    for name, count in {"train/a": 3, "train/b": 2, "test/c": 2, "test/a": 1}.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20, 30), (number * 40, len(name), 9)).save(root / name / f"{number}.jpg")
    (root / "train/a/broken.jpg").write_text("x")
    return root


def run(*arguments: object) -> str:
    result = CliRunner().invoke(data, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_prepare_and_inspect(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "src")
    said = run("prepare", "folder", "--root", root, "--out", tmp_path / "out")
    assert "written to" in said
    assert "1 images could not be read" in said
    assert "train/a/broken.jpg: UnidentifiedImageError" in said
    assert "1 classes are in train and in test" in said
    assert "nothing to do" in run("prepare", "folder", "--root", root, "--out", tmp_path / "out")
    said = run("inspect", tmp_path / "out")
    counts = [line.split()[:6] for line in said.splitlines()[1:3]]
    assert counts == [["train", "5", "2", "2", "2.5", "3"], ["test", "3", "2", "1", "1.5", "2"]]
    with Image.open(tmp_path / "out/contact_sheet.png") as sheet:
        assert sheet.size == (720, 4 * 86)
        assert sheet.convert("L").getextrema()[0] < 60
    assert "test has one class" not in said
    # What inspect wrote does not make the data set another one.
    assert "nothing to do" in run("prepare", "folder", "--root", root, "--out", tmp_path / "out")


def test_a_single_test_class_tells_nothing(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "src")
    shutil.rmtree(root / "test/a")
    assert "test has one class: whatever is found is right there" in run("prepare", "folder", "--root", root, "--out", tmp_path / "out")


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs --root"):
        run("prepare", "csv", "--out", tmp_path / "out")
    with pytest.raises(InputError, match="data prepare"):
        run("inspect", tmp_path)
