"""The VehicleID reader: the archive's layout, overlapping and separate lists, and one message for every bad tree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dnc_dist import cli
from dnc_dist.base.errors import InputError
from dnc_dist.data.index import open_index
from dnc_dist.data.readers import read, vehicleid
from dnc_dist.data.rows import ShardReader
from dnc_dist.data.shards import write_shards
from tests.vehicleid_fixtures import DISJOINT, NESTED, make_vehicleid


@pytest.mark.parametrize("lists", [NESTED, DISJOINT], ids=["nested", "disjoint"])
def test_round_trip(lists: dict[str, range], tmp_path: Path) -> None:
    root = make_vehicleid(tmp_path / "src", lists)
    assert write_shards(read("vehicleid", root), tmp_path / "out")
    index = open_index(tmp_path / "out")
    train, test = index.view("train"), index.view("test")
    assert set(train.class_names) == {str(vehicle) for vehicle in lists["train"]} and not train.lists
    assert len(index) == len(train) + len(test) == 4 * len({vehicle for ids in lists.values() for vehicle in ids})
    assert set(test.lists) == {"small", "medium", "large"}
    for name, inside in test.lists.items():
        assert {test.class_names[label] for label in test.labels[inside]} == {str(vehicle) for vehicle in lists[name]}
        assert inside.sum() == 4 * len(lists[name])
    sources = [source.decode() for source in index.columns["source"]]
    assert len(set(sources)) == len(sources) and "image/0999999.jpg" not in sources
    assert ShardReader(index).read(0) == (root / sources[0]).read_bytes()


def test_what_the_command_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_vehicleid(tmp_path / "src")
    assert cli.run(["data", "prepare", "vehicleid", "--root", str(root), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "not the release: train_list.txt has 24 images of 6 ids (released: 113,346 of 13,164)" in said
    assert "small and medium share 12, small and large share 12, medium and large share 20" in said
    assert "1 files in image/ are in none of these lists" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["small", "12", "3"] in rows and ["medium", "20", "5"] in rows and ["large", "28", "7"] in rows


def test_the_released_counts_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vehicleid, "RELEASED", {"train": (24, 6), "small": (12, 3), "medium": (20, 5), "large": (28, 7)})
    notes = read("vehicleid", make_vehicleid(tmp_path / "src")).notes
    assert notes[0].startswith("as released: train_list.txt has 24 images of 6 ids")


def test_the_lists_are_part_of_the_content(tmp_path: Path) -> None:
    root = make_vehicleid(tmp_path / "src")
    write_shards(read("vehicleid", root), tmp_path / "one")
    small = root / "train_test_split/test_list_800.txt"
    small.write_text("\n\n".join(small.read_text().splitlines()[:-1]) + "\r\n")  # blank lines and other line ends do not matter
    write_shards(read("vehicleid", root), tmp_path / "two")
    first, second = (open_index(tmp_path / name) for name in ("one", "two"))
    assert first.content_hash != second.content_hash
    assert [index.view("test").lists["small"].sum() for index in (first, second)] == [12, 11]
    np.testing.assert_array_equal(first.columns["label"], second.columns["label"])


def _edit(file: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / "train_test_split" / file
        path.write_text(change(path.read_text()))

    return edit


BAD_TREES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing list": (
        lambda root: (root / "train_test_split/test_list_1600.txt").unlink(),
        r"test_list_1600\.txt is missing; --root must be",
    ),
    "another folder": (lambda root: (root / "train_test_split").rename(root / "splits"), r"train_list\.txt is missing; --root must be"),
    "no text": (lambda root: (root / "train_test_split/train_list.txt").write_bytes(b"\xff\xfe"), r"train_list\.txt is not UTF-8"),
    "missing image": (
        lambda root: (root / "image/0000010.jpg").unlink(),
        r"1 of 52 images .* missing, first \S*image/0000010\.jpg; unpack",
    ),
    "no images": (lambda root: (root / "image").rename(root / "pictures"), r"52 of 52 images"),
    "malformed row": (
        _edit("train_list.txt", lambda text: text.replace("0000010 1", "0000010,1")),
        r"train_list\.txt, line 2: '0000010,1' is no",
    ),
    "a third column": (
        _edit("test_list_800.txt", lambda text: text.replace(" 11\n", " 11 c\n", 1)),
        r"test_list_800\.txt, line 1: .* is no",
    ),
    "id in both": (
        _edit("train_list.txt", lambda text: text + "0000423 17\n"),
        r"1 ids are in train_list\.txt and in test_list_2400\.txt .* 17;",
    ),
    "two ids": (
        _edit("test_list_1600.txt", lambda text: text.replace(" 11\n", " 12\n", 1)),
        r"test_list_1600\.txt, line 1: .* id 12, but id 11",
    ),
    "empty list": (_edit("test_list_2400.txt", lambda text: ""), r"test_list_2400\.txt lists 0 images and no vehicle twice"),
}


@pytest.mark.parametrize("name", list(BAD_TREES))
def test_a_bad_tree_gives_one_message(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = BAD_TREES[name]
    root = make_vehicleid(tmp_path / "src")
    spoil(root)
    with pytest.raises(InputError, match=message):
        read("vehicleid", root)
    assert cli.run(["data", "prepare", "vehicleid", "--root", str(root), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1 and "Traceback" not in captured.err + captured.out
    assert not (tmp_path / "out").exists()


def test_the_root_must_be_given(tmp_path: Path) -> None:
    assert cli.run(["data", "prepare", "vehicleid", "--out", str(tmp_path / "out")]) == 2
