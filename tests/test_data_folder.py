"""The reader of folders: classes at any depth, and images without classes, which are a gallery."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dnc_dist import cli
from dnc_dist.base.errors import InputError
from dnc_dist.data.index import NO_LABEL, open_index, row_key, train_view
from dnc_dist.data.listing import list_images
from dnc_dist.data.readers import NO_CLASS, Reading, Sample, read
from dnc_dist.data.shards import write_shards
from dnc_dist.data.stream import SequentialBatches
from dnc_dist.data.transforms import Geometry
from tests.run_fixtures import dnc, without_report, write_config
from tests.test_data_prepare import jpeg, make_folder


def test_a_class_is_the_folder_that_holds_the_images(tmp_path: Path) -> None:
    root = make_folder(
        tmp_path, {"train/w/dresses/id_1": 2, "train/w/dresses/id_2": 2, "train/m": 2, "train/m/coats": 2, "query/w/x": 1, "gallery/w/x": 1}
    )
    reading = read("folder", root)
    classes = {sample.source: (sample.split, sample.class_name) for sample in reading.samples}
    assert classes["train/w/dresses/id_1/00.jpg"] == ("train", "w/dresses/id_1")
    assert classes["train/m/01.jpg"] == ("train", "m") and classes["train/m/coats/01.jpg"] == ("train", "m/coats")
    assert classes["query/w/x/00.jpg"] == classes["gallery/w/x/00.jpg"] == ("test", "w/x")
    assert "a class is a folder that holds images: 4 of 5 lie deeper than one level, first m/coats" in reading.notes
    assert "1 of these lie inside of another class and are classes of their own, first m/coats" in reading.notes
    deep = read("folder", make_folder(tmp_path / "other", {"a/b/c": 2, "a/b/d": 2, "e": 2}), test_share=0.3)
    assert {sample.class_name for sample in deep.samples} == {"a/b/c", "a/b/d", "e"}
    assert "1 of 3 classes" in deep.notes[0]


def gallery(place: Path, count: int = 70) -> Path:
    """A flat folder of noisy images, all different."""
    place.mkdir(parents=True)
    generator = np.random.default_rng(3)
    for number in range(count):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place / f"{number:03d}.jpg")
    return place


def test_a_flat_folder_is_a_gallery(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = gallery(tmp_path / "src")
    assert cli.run(["data", "prepare", "folder", "--root", str(root), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "folder: no classes: all images are a gallery" in said
    assert "no classes: a gallery to be embedded and searched; nothing can be trained or measured on it" in said
    index = open_index(tmp_path / "out")
    assert not index.labelled and index.splits == ["test"] and len(index.shard_paths) == 64
    listed = list_images(tmp_path / "out")
    assert listed.labels == listed.classes == [None] * 70
    assert {read() for read in listed.readers(0, 70)} and listed.keys == [row_key(row) for row in range(70)]
    view = index.view("test")
    assert len(view) == 70 and view.num_classes == 0 and set(view.labels) == {NO_LABEL}
    assert view.gallery.all() and not view.query.any()
    assert {source.decode() for source in index.columns["source"]} == {path.name for path in root.iterdir()}
    blocks = list(SequentialBatches(index, view, Geometry(None, 16, 1.0), block_size=32, rank=0, world=1, workers=0))
    assert sorted(row for block in blocks for row in view.rows[block.places[block.valid].numpy()].tolist()) == view.rows.tolist()
    assert cli.run(["data", "inspect", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out/contact_sheet.png") as sheet:
        assert sheet.size == (720, 7 * 86)
    for share in (0.0, 0.2):
        with pytest.raises(InputError, match="holds images without classes"):
            train_view(index, share)


def test_folders_that_are_no_classes(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"2024/may": 2, "2024/june": 1})
    (root / "2024/front.jpg").write_bytes(jpeg(77))
    reading = read("folder", root, labels="none")
    sources = ["2024/front.jpg", "2024/june/00.jpg", "2024/may/00.jpg", "2024/may/01.jpg"]
    assert [sample.source for sample in reading.samples] == sources
    roles = {(sample.class_name, sample.split, sample.query, sample.gallery) for sample in reading.samples}
    assert roles == {(NO_CLASS, "test", False, True)}


def test_all_images_have_a_class_or_none_has(tmp_path: Path) -> None:
    samples = [Sample(name, "test", f"{number}", data=jpeg(number)) for number, name in enumerate(("a", NO_CLASS, NO_CLASS))]
    with pytest.raises(InputError, match="2 of 3 images without a class"):
        write_shards(Reading("list", samples, {}), tmp_path / "out")


def test_nothing_is_trained_or_measured_without_classes(tmp_path: Path) -> None:
    assert dnc("data", "prepare", "folder", "--root", gallery(tmp_path / "src"), "--out", "gallery", folder=tmp_path).code == 0
    write_config(tmp_path, Path("gallery"))
    error = dnc("train", "run.yaml", folder=tmp_path, before=without_report).error
    assert "gallery holds images without classes" in error and "data.root" in error
    assert dnc("doctor", "data", "run.yaml", folder=tmp_path).code == 1


def test_a_folder_to_embed_has_the_classes_of_one_to_prepare(tmp_path: Path) -> None:
    for place in ("a/sub", "a", "test/b", "test"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / place / "x.jpg")
    listed = list_images(tmp_path)
    assert dict(zip(listed.keys, listed.classes, strict=True)) == {
        "a/sub/x.jpg": "a/sub",
        "a/x.jpg": "a",
        "test/b/x.jpg": "b",
        "test/x.jpg": "test",
    }
