"""Readers, shard writer and index: round trips, determinism, and one clear message for every bad input."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from dnc_dist.base.errors import InputError
from dnc_dist.data.images import Form, decode, normalise
from dnc_dist.data.index import hashed_share, open_index, train_view, validation_view
from dnc_dist.data.readers import Reading, Sample, read
from dnc_dist.data.rows import ShardReader
from dnc_dist.data.shards import shard_of_class, write_shards


def jpeg(value: int, size: tuple[int, int] = (12, 12), mode: str = "RGB", **options: object) -> bytes:
    """An encoded image of one grey value (and a gradient, so that no two are equal)."""
    pixels = np.clip(np.arange(size[0] * size[1]).reshape(size[1], size[0]) % 40 + value, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, **{"format": "JPEG", **options})  # type: ignore[arg-type]
    return buffer.getvalue()


def make_folder(root: Path, layout: dict[str, int]) -> Path:
    """Write ``layout`` (folder below root: number of images)."""
    value = 0
    for name, count in layout.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / name / f"{number:02d}.jpg").write_bytes(jpeg(value))
            value += 3
    return root


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


SPLIT_LAYOUT = {"train/a": 3, "train/b": 2, "train/c": 1, "test/d": 2, "test/e": 2}


def test_folder_round_trip(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "src", SPLIT_LAYOUT)
    (root / "train/a/.hidden.jpg").write_bytes(b"x")
    (root / "train/a/notes.txt").write_text("x")
    assert write_shards(read("folder", root), tmp_path / "out")
    index = open_index(tmp_path / "out")
    assert index.splits == ["train", "test"]
    assert len(index) == 10
    train = index.view("train")
    assert sorted(train.class_names) == ["a", "b", "c"]
    assert train.num_classes == 3
    assert np.array_equal(np.unique(train.labels), [0, 1, 2])
    reader = ShardReader(index)
    for row in range(len(index)):
        source = index.columns["source"][row].decode()
        assert reader.read(row) == (root / source).read_bytes()
        assert index.class_names[index.columns["label"][row]] == source.split("/")[1]
        assert source in index.key(row)
    # A class's samples stand together, and rows are in the order of the shards.
    assert np.count_nonzero(np.diff(train.labels)) == 2
    assert (np.diff(index.columns["shard"]) >= 0).all()
    urls = [str(path) for path in index.shard_paths]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, seed=0))
    assert [int(sample["__key__"]) for sample in samples] == list(range(10))
    assert [int(sample["cls"]) for sample in samples] == index.columns["label"].tolist()


def test_same_bytes_on_every_run(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "src", SPLIT_LAYOUT)
    for name in ("one", "two"):
        write_shards(read("folder", root), tmp_path / name)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    write_shards(read("folder", root), tmp_path / "three", seed=1)
    assert files_of(tmp_path / "one") != files_of(tmp_path / "three")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "src", "three", "two"]  # nothing partial is left


def test_existing_output(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "src", SPLIT_LAYOUT)
    out = tmp_path / "out"
    assert write_shards(read("folder", root), out)
    before = files_of(out)
    assert not write_shards(read("folder", root), out)  # the very same: nothing to do
    make_folder(root, {"train/z": 2})
    with pytest.raises(InputError, match="--force"):
        write_shards(read("folder", root), out)
    assert files_of(out) == before
    assert write_shards(read("folder", root), out, force=True)
    assert open_index(out).view("train").num_classes == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious.txt").write_text("x")
    with pytest.raises(InputError, match="another --out"):
        write_shards(read("folder", root), tmp_path / "mine", force=True)
    assert (tmp_path / "mine/precious.txt").exists()


def test_class_only_folder_states_its_rule(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "src", {f"c{number}": 2 for number in range(8)})
    reading = read("folder", root, test_share=0.25)
    splits = {sample.class_name: sample.split for sample in reading.samples}
    assert sorted(splits.values()).count("test") == 2
    assert "2 of 8 classes" in reading.notes[0]
    assert {sample.class_name: sample.split for sample in read("folder", root, test_share=0.25).samples} == splits
    assert {sample.split for sample in read("folder", root, test_share=0.0).samples} == {"train"}


def test_query_and_gallery_folders(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "src", {"train/a": 2, "train/b": 2, "query/c": 1, "gallery/c": 2, "docs/x": 1})
    reading = read("folder", root)
    assert "docs" in reading.notes[0]
    write_shards(reading, tmp_path / "out")
    test = open_index(tmp_path / "out").view("test")
    assert (test.query.sum(), test.gallery.sum(), test.num_classes) == (1, 2, 1)
    assert not (test.query & test.gallery).any()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, "no image"),
        ({"train/a": 0}, "no image"),
        ({"train/a": 3}, "one training class"),
        ({"a": 3}, "one training class"),
        ({"train/a": 1, "train/b": 1, "test/c": 2}, "positive pair"),
        ({"test/a": 2, "test/b": 2, "train/c": 0}, "no training image"),
    ],
)
def test_nothing_to_learn_from(tmp_path: Path, layout: dict[str, int], message: str) -> None:
    root = make_folder(tmp_path / "src", layout)
    root.mkdir(exist_ok=True)
    with pytest.raises(InputError, match=message):
        write_shards(read("folder", root), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        read("folder", tmp_path / "nowhere")
    with pytest.raises(InputError, match="no file"):
        read("csv", tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match="data prepare"):
        open_index(tmp_path)


def test_unreadable_images_are_counted(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "src", SPLIT_LAYOUT)
    whole = jpeg(1, size=(64, 64))
    (root / "train/a/broken.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "train/a/text.jpg").write_text("no image at all")
    write_shards(read("folder", root), tmp_path / "out")
    manifest = open_index(tmp_path / "out").manifest
    assert manifest.num_rows == 10
    assert sorted(entry.source for entry in manifest.unreadable) == ["train/a/broken.jpg", "train/a/text.jpg"]
    assert all(entry.reason for entry in manifest.unreadable)


def test_all_training_images_unreadable(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "src", {"test/d": 2})
    for name in ("a", "b"):
        (root / "train" / name).mkdir(parents=True)
        for number in range(2):
            (root / "train" / name / f"{number}.jpg").write_text("x")
    with pytest.raises(InputError, match="4 unreadable"):
        write_shards(read("folder", root), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_truncated_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    write_shards(read("folder", make_folder(tmp_path / "src", SPLIT_LAYOUT)), tmp_path / "out")
    shard = open_index(tmp_path / "out").shard_paths[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    with pytest.raises(InputError, match=rf"{shard.name} has .* truncated"):
        open_index(tmp_path / "out")
    shard.unlink()
    with pytest.raises(InputError, match=rf"{shard.name} is missing"):
        open_index(tmp_path / "out")
    shard.write_bytes(data)
    open_index(tmp_path / "out")
    column = tmp_path / "out/index/label.npy"
    column.write_bytes(column.read_bytes()[:100])
    with pytest.raises(InputError, match=r"label\.npy is damaged"):
        open_index(tmp_path / "out")
    manifest = tmp_path / "out/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 0}))
    with pytest.raises(InputError, match="no manifest of format"):
        open_index(tmp_path / "out")


def test_normalise_keeps_or_converts() -> None:
    plain = jpeg(50, size=(20, 10))
    assert normalise(plain) == plain
    assert decode(normalise(plain, Form(max_side=10))).size == (10, 5)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = jpeg(50, size=(20, 10), exif=exif)
    assert decode(turned).size == (10, 20)
    upright = normalise(turned)
    with Image.open(io.BytesIO(upright)) as image:
        assert (image.size, image.mode, image.format) == ((10, 20), "RGB", "JPEG")
        assert not image.getexif()
    assert decode(normalise(plain, box=(2, 0, 30, 5))).size == (18, 5)
    with pytest.raises(ValueError, match="no pixel"):
        normalise(plain, box=(30, 0, 40, 5))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    data = jpeg(120, mode=mode)
    assert decode(data).mode == "RGB"
    with Image.open(io.BytesIO(normalise(data))) as image:
        assert (image.mode, image.format) == ("RGB", "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int)
    assert np.abs(np.asarray(decode(normalise(data)), dtype=int) - expected).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_is_white(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, format="PNG")
    pixels = np.asarray(decode(buffer.getvalue()))
    assert (pixels[:, 4:] == 255).all()
    assert (pixels[:, :4] == 0).all()


def test_sixteen_bit_grey() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(buffer, format="PNG")
    assert np.abs(np.asarray(decode(buffer.getvalue())).astype(int) - 40000 // 257).max() <= 1


OML = """label,path,split,is_query,is_gallery,category,x_1,x_2,y_1,y_2,note
0,images/0.jpg,train,,,shoe,0,6,0,12,x
0,images/1.jpg,train,,,shoe,,,,,x
1,images/2.jpg,train,,,bag,,,,,x
1,images/3.jpg,train,,,bag,,,,,x
7,images/4.jpg,validation,True,False,bag,,,,,x
7,images/5.jpg,validation,False,True,bag,,,,,x
8,images/6.jpg,validation,True,True,bag,,,,,x
"""


def make_table(root: Path, text: str) -> Path:
    make_folder(root, {"images": 7})
    for number, path in enumerate(sorted((root / "images").iterdir())):
        path.rename(root / f"images/{number}.jpg")
    (root / "table.csv").write_text(text)
    return root / "table.csv"


def test_open_metric_learning_table(tmp_path: Path) -> None:
    reading = read("csv", make_table(tmp_path / "src", OML))
    assert any("validation split is the test split" in note for note in reading.notes)
    assert any("note" in note and "category" not in note for note in reading.notes)
    write_shards(reading, tmp_path / "out")
    index = open_index(tmp_path / "out")
    assert index.splits == ["train", "test"]
    test = index.view("test")
    order = np.argsort(index.columns["source"][test.rows])
    assert test.query[order].tolist() == [True, False, True]
    assert test.gallery[order].tolist() == [False, True, True]
    assert set(index.columns["category"]) == {b"shoe", b"bag"}
    boxed = int(np.flatnonzero(index.columns["source"] == b"images/0.jpg")[0])
    assert decode(ShardReader(index).read(boxed)).size == (6, 12)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("label,path", "name,path", "no column label"),
        ("3.jpg,train", "3.jpg,trian", "line 5: split='trian'"),
        ("images/3.jpg", "images/99.jpg", "1 of 7 images"),
        ("True,False", "perhaps,False", "line 6: is_query"),
        ("0,6,0,12", "0,6,zero,12", "line 2: the box"),
    ],
)
def test_bad_table(tmp_path: Path, old: str, new: str, message: str) -> None:
    table = make_table(tmp_path / "src", OML.replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        read("csv", table)


def test_validation_classes(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "src", {**{f"train/{number}": 2 for number in range(10)}, "test/x": 2})
    write_shards(read("folder", root), tmp_path / "out")
    index = open_index(tmp_path / "out")
    assert validation_view(index) is None
    train, held_out = train_view(index, 0.3), validation_view(index, 0.3)
    assert held_out is not None
    assert (train.num_classes, held_out.num_classes) == (7, 3)
    assert not set(train.class_names) & set(held_out.class_names)
    assert sorted([*train.rows, *held_out.rows]) == index.view("train").rows.tolist()
    assert train.labels.max() == 6
    other = validation_view(index, 0.3, seed=1)
    assert other is not None
    assert other.class_names != held_out.class_names
    with pytest.raises(InputError, match="at least 2"):
        train_view(index, 0.1)


def test_hashed_share_does_not_depend_on_order() -> None:
    names = [f"class {number}" for number in range(50)]
    chosen = hashed_share(names, 0.2, 3, "x")
    assert len(chosen) == 10
    assert hashed_share(names[::-1], 0.2, 3, "x") == chosen


@pytest.mark.parametrize(
    ("sizes", "count"),
    [([5] * 10, 10), ([5] * 1000, 64), ([10**9] + [1] * 99, 64), ([1] * 99 + [10**9], 64), ([2**20] * 64 * 512, 128)],
)
def test_number_of_shards(sizes: list[int], count: int) -> None:
    shards = shard_of_class(sizes)
    assert shards[0] == 0
    assert set(np.diff(shards)) <= {0, 1}
    assert shards[-1] == count - 1


def test_more_shards_where_more_are_asked_for() -> None:
    assert shard_of_class([5] * 1000, 200)[-1] == 199
    assert shard_of_class([2**20] * 64 * 512, 100)[-1] == 127  # 256 MB are enough for one
    assert shard_of_class([5] * 10, 200)[-1] == 9


def test_tar_holds_no_dates(tmp_path: Path) -> None:
    samples = [Sample(name, "train", f"{name}{at}", data=jpeg(at)) for name in "ab" for at in range(2)]
    write_shards(Reading("list", samples, {}), tmp_path / "out")
    with tarfile.open(open_index(tmp_path / "out").shard_paths[0]) as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


def test_glyphs(tmp_path: Path) -> None:
    reading = read("glyphs", classes=20, image_size=24)
    again = read("glyphs", classes=20, image_size=24)
    assert reading.samples == again.samples
    by_class: dict[str, list[Sample]] = {}
    for sample in reading.samples:
        by_class.setdefault(sample.class_name, []).append(sample)
    assert len(by_class) == 20
    assert all(5 <= len(samples) <= 10 and len({sample.split for sample in samples}) == 1 for samples in by_class.values())
    assert sum(samples[0].split == "test" for samples in by_class.values()) == 10
    assert len({sample.data for sample in reading.samples}) == len(reading.samples)
    for sample in reading.samples:
        pixels = np.asarray(decode(sample.read()))
        assert pixels.shape == (24, 24, 3)
        assert np.ptp(pixels.astype(int)) > 30  # something is drawn
    write_shards(reading, tmp_path / "out")
    assert open_index(tmp_path / "out").splits == ["train", "test"]


def test_bad_fonts_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--fonts"):
        read("glyphs", fonts=tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no"):
        read("glyphs", fonts=tmp_path)
