"""Pictures and tables as people have them: links, pipes, odd names, deep pixels, metadata, duplicates; and the lines of a table."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dnc_dist import cli
from dnc_dist.base.errors import InputError
from dnc_dist.data.images import DECODE_ERRORS, decode, normalise
from dnc_dist.data.index import open_index
from dnc_dist.data.jpeg import without_metadata
from dnc_dist.data.listing import list_images, list_queries
from dnc_dist.data.readers import Reading, Sample, read
from dnc_dist.data.rows import ShardReader
from dnc_dist.data.shards import write_shards
from tests.test_data_prepare import OML, jpeg, make_folder, make_table

LAYOUT = {"train/a": 3, "train/b": 2, "test/c": 2}


def prepared(root: Path) -> tuple[dict[str, str], list[str]]:
    """What ``data prepare folder`` leaves out (source -> reason), and its notes."""
    reading = read("folder", root)
    out = root.parent / "out"
    write_shards(reading, out)
    index = open_index(out)
    json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert len(index) + len(index.manifest.unreadable) == len(reading.samples)
    return {entry.source: entry.reason for entry in index.manifest.unreadable}, reading.notes


def huge_png() -> bytes:
    """A few bytes that say they hold 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")


UNREADABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe.jpg": (os.mkfifo, "no regular file"),
    "annex.jpg": (lambda path: path.symlink_to("../.git/annex/objects/x"), "No such file"),
    "itself.jpg": (lambda path: path.symlink_to("itself.jpg"), "symbolic links"),
    "device.jpg": (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
    "zero.jpg": (lambda path: path.write_bytes(b""), "cannot identify image file"),
    "bomb.png": (lambda path: path.write_bytes(huge_png()), "DecompressionBombError"),
    "postscript.jpg": (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "cannot identify image file"),
    "float.tif": (
        lambda path: Image.fromarray(np.full((4, 4), 9.5, np.float32)).save(path),
        "from 9.5 to 9.5; they must be",
    ),
    "nan.tif": (lambda path: Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(path), "they must be within [0, 1]"),
    "below.tif": (lambda path: Image.fromarray(np.full((4, 4), -1, np.int32)).save(path), "from -1 to -1; they must be within [0, 65535]"),
    "beyond.tif": (lambda path: Image.fromarray(np.full((4, 4), 65536, np.int32)).save(path), "they must be within [0, 65535]"),
}


def test_what_cannot_be_read_is_listed_with_its_reason(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "src", LAYOUT)
    for name, (make, _) in UNREADABLE.items():
        make(root / "train/a" / name)
    lost, _ = prepared(root)
    assert set(lost) == {f"train/a/{name}" for name in UNREADABLE}
    for name, (_, reason) in UNREADABLE.items():
        assert reason in lost[f"train/a/{name}"], name
    first = (tmp_path / "out/manifest.json").read_bytes()
    shutil.rmtree(tmp_path / "out")
    prepared(root)
    assert (tmp_path / "out/manifest.json").read_bytes() == first  # no address of an object, no order of threads


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_damaged_tag_of_a_tiff_is_a_reason() -> None:
    """Every byte of a small TIFF changed in some ways: Pillow itself fails on some with a TypeError."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 9).save(buffer, format="TIFF")
    whole = buffer.getvalue()
    for at, value in itertools.product(range(len(whole)), (0, 2, 5, 7, 11, 12, 255)):
        with contextlib.suppress(DECODE_ERRORS):
            normalise(whole[:at] + bytes([value]) + whole[at + 1 :])


@pytest.mark.parametrize("look", [lambda root: prepared(root), list_images], ids=["prepare", "embed"])
def test_a_folder_that_cannot_be_read_is_not_passed_over(
    look: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, scandir = make_folder(tmp_path / "src", LAYOUT), os.scandir

    def forbidden(path: Any) -> Any:
        if str(path).endswith("train/a"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(PermissionError, match="train/a"):
        look(root)


def test_prepared_data_among_the_images_is_no_class(tmp_path: Path) -> None:
    """As when `--out` is in the folder of the images, and `data inspect` has drawn its contact sheet."""
    root = make_folder(tmp_path / "src", LAYOUT)
    expected = [str(path) for path in sorted(root.rglob("*.jpg"))]
    for place in ("train/out", "train/a/out"):
        write_shards(read("folder", make_folder(tmp_path / place, {"train/a": 2, "train/b": 2})), root / place)
        (root / place / "contact_sheet.png").write_bytes(jpeg(1))
    _, notes = prepared(root)
    assert notes == ["skipped, as they are no images that can be read: 2 prepared data set(s)"]
    images = list_images(root)
    assert images.keys == [path.removeprefix(f"{root}/") for path in expected] and list_queries([root]).keys == expected


def test_a_prepared_data_set_is_no_folder_of_images(tmp_path: Path) -> None:
    write_shards(read("folder", make_folder(tmp_path / "src", LAYOUT)), tmp_path / "data")
    with pytest.raises(InputError, match=r"--root \S+/data is a prepared data set; give the folder of images"):
        read("folder", tmp_path / "data")


def test_columns_between_semicolons(tmp_path: Path) -> None:
    """As some spreadsheets write them."""
    (tmp_path / "a.csv").write_text("path;label\na.jpg;x\n")
    with pytest.raises(InputError, match=r"a\.csv: its columns are separated by semicolons; save it with commas"):
        list_images(tmp_path / "a.csv")


def test_a_file_called_manifest_makes_no_prepared_data(tmp_path: Path) -> None:
    """Others write files of that name, too: a scraper, a browser's extension."""
    root = make_folder(tmp_path / "src", LAYOUT)
    (root / "train/a/manifest.json").write_text('{"source": "scraper"}')
    _, notes = prepared(root)
    assert notes == ["skipped, as they are no images that can be read: 1 .json"]
    assert len(open_index(tmp_path / "out")) == sum(LAYOUT.values())
    assert len(list_images(root / "train/a")) == len(list_queries([root / "train/a"])) == LAYOUT["train/a"]


def test_other_endings_are_counted(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "src", LAYOUT)
    for number in range(3):
        (root / f"train/a/{number}.HEIC").write_bytes(b"x")
    (root / "train/b/notes.txt").write_text("x")
    (root / "train/b/Makefile").write_text("x")
    (root / "train/loose.jpg").write_bytes(jpeg(1))
    (root / "train/a/more.jfif").write_bytes(jpeg(100))
    Image.open(io.BytesIO(jpeg(150))).save(root / "train/a/more.avif")
    _, notes = prepared(root)
    assert notes == [
        "skipped, as they are no images that can be read: 3 .heic, 1 .jpg outside of class folders, 1 without an ending, 1 .txt"
    ]
    sources = open_index(tmp_path / "out").columns["source"]
    assert {b"train/a/more.jfif", b"train/a/more.avif"} <= set(sources)


@pytest.mark.timeout(60)
def test_links_to_folders(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "src", LAYOUT)
    (root / "train/a/up").symlink_to("..")
    (root / "train/a/top").symlink_to("../..")
    (root / "train/again").symlink_to("..")
    (root / "train/a/self").symlink_to(".")
    elsewhere = make_folder(tmp_path / "elsewhere", {"x": 2})
    (root / "train/a/one").symlink_to(elsewhere)
    (root / "train/a/two").symlink_to(elsewhere)
    (root / "train/a/one_more").symlink_to(elsewhere / "x")
    reading = read("folder", root)
    assert len(reading.samples) == 7 + 2  # each real folder once, whatever leads to it
    # A class is the folder that holds the images; the second link to a folder leads to nothing new.
    assert {sample.class_name for sample in reading.samples} == {"a", "b", "c", "a/one_more"}
    assert any(note.startswith("skipped 4 link(s) to a folder above, first ") for note in reading.notes)


def test_names_that_are_no_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = make_folder(tmp_path / "src\udce9", LAYOUT)
    place = os.fsencode(root) + b"/train/caf\xe9"
    os.mkdir(place)
    for name in (b"\xe9.jpg", b"two\n.jpg", b"broken\xff.jpg"):
        with open(place + b"/" + name, "wb") as file:
            file.write(jpeg(len(name) * 20) if b"broken" not in name else b"")
    out = tmp_path / "out"
    assert cli.run(["data", "prepare", "folder", "--root", str(root), "--out", str(out)]) == 0
    assert cli.run(["data", "inspect", str(out)]) == 0
    said = capfd.readouterr().out
    assert r"train/caf\xe9/broken\xff.jpg: " in said
    index = open_index(out)
    assert r"caf\xe9" in index.class_names and rb"train/caf\xe9/\xe9.jpg" in set(index.columns["source"])


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 257, 40000, 65535], np.uint16, [0, 1, 155, 255]),
        ([0, 1, 200, 255], np.int32, [0, 1, 200, 255]),
        ([0, 257, 40000, 65535], np.int32, [0, 1, 155, 255]),
        ([0.0, 0.25, 0.5, 1.0], np.float32, [0, 64, 128, 255]),
    ],
)
def test_deep_grey(values: list[float], dtype: type, expected: list[int], tmp_path: Path) -> None:
    Image.fromarray(np.array([values], dtype)).save(tmp_path / "deep.tif")
    pixels = np.asarray(decode((tmp_path / "deep.tif").read_bytes()))
    assert pixels.tolist() == [[[value] * 3 for value in expected]]


# ---------------------------------------------------------------- metadata

SECRET = b"SECRET-PLACE"


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def with_segments(data: bytes, *segments: bytes, tail: bytes = b"") -> bytes:
    """A JPEG with segments after its first two bytes."""
    return data[:2] + b"".join(segments) + data[2:] + tail


def exif(orientation: int | None = None) -> bytes:
    tags = Image.Exif()
    tags[0x010E] = SECRET.decode()
    tags.get_ifd(0x8825)[29] = SECRET.decode()  # a GPS tag
    if orientation is not None:
        tags[0x0112] = orientation
    return tags.tobytes()


def noise(**options: Any) -> bytes:
    generator = np.random.default_rng(3)
    buffer = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


JFIF_THUMBNAIL = b"JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x01\x01" + SECRET[:3]
PLAIN = noise()
JPEGS = {
    "as it is": PLAIN,
    "exif": noise(exif=exif()),
    "exif upright": noise(exif=exif(1)),
    "comment, profile and quality": noise(comment=SECRET, icc_profile=SECRET * 9000, quality=40),
    "progressive with restarts": noise(progressive=True, restart_marker_blocks=3, comment=SECRET, quality=97),
    "every application's": with_segments(PLAIN, *(segment(0xE0 + number, SECRET) for number in range(1, 16) if number != 14)),
    "fill bytes": with_segments(PLAIN, b"\xff\xff" + segment(0xFE, SECRET)),
    "behind the end": with_segments(PLAIN, tail=SECRET + PLAIN),
    "JFIF with a thumbnail": PLAIN[:2] + segment(0xE0, JFIF_THUMBNAIL) + PLAIN[20:],
    "Adobe, RGB as it is": with_segments(PLAIN[:2] + PLAIN[20:], segment(0xEE, b"Adobe\x00\x64\x00\x00\x00\x00\x00")),
    "Adobe, YCC": with_segments(PLAIN[:2] + PLAIN[20:], segment(0xEE, b"Adobe\x00\x64\x00\x00\x00\x00\x01"), segment(0xEE, SECRET)),
    "no JFIF": PLAIN[:2] + PLAIN[20:],
}


@pytest.mark.parametrize("name", list(JPEGS))
def test_metadata_goes_and_pixels_stay(name: str) -> None:
    data = JPEGS[name]
    stored = normalise(data)
    assert SECRET not in stored and SECRET[:3] + b"\xff" not in stored
    assert len(stored) <= len(data)
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(stored)) as after:
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
        assert not after.getexif() and not {"comment", "icc_profile", "exif", "xmp"} & set(after.info)
    assert normalise(stored) == stored == without_metadata(stored)
    if name == "as it is":
        assert stored == data
    scan = data[data.index(b"\xff\xda") : data.index(b"\xff\xd9", data.index(b"\xff\xda"))]
    assert scan in stored  # not compressed anew


def test_what_is_compressed_anew_takes_no_metadata_along() -> None:
    turned = noise(exif=exif(6), comment=SECRET)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", SECRET.decode())
    png, webp, gif = io.BytesIO(), io.BytesIO(), io.BytesIO()
    picture = Image.open(io.BytesIO(PLAIN))
    picture.save(png, "PNG", pnginfo=text, exif=exif())
    picture.save(webp, "WEBP", lossless=True, exif=exif(3), xmp=SECRET)
    picture.convert("P").save(gif, "GIF", comment=SECRET)
    for data in (turned, png.getvalue(), webp.getvalue(), gif.getvalue()):
        assert SECRET in data and SECRET not in normalise(data)
        assert not Image.open(io.BytesIO(normalise(data))).getexif()
    assert decode(normalise(turned)).size == (40, 50)
    upside = decode(normalise(webp.getvalue()))
    difference = np.asarray(upside, int)[::-1, ::-1] - np.asarray(picture, int)
    assert np.abs(difference).mean() < 10  # turned by 180 degrees; a quality of 95 is near to what it was


@pytest.mark.parametrize("length", [0, 1, 0xFFFF])
def test_segments_that_mean_nothing(length: int) -> None:
    data = with_segments(PLAIN, b"\xff\xfe" + length.to_bytes(2, "big"))
    with pytest.raises(ValueError, match="reaches beyond the end"):
        without_metadata(data)
    with pytest.raises(ValueError, match="no JPEG"):
        without_metadata(b"")


# ---------------------------------------------------------------- duplicates


def test_duplicates_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = {"a": ("train", [1, 2, 2]), "b": ("train", [1, 7, 8]), "c": ("test", [1, 9, 9])}
    samples = []
    for name, (split, values) in classes.items():
        samples += [Sample(name, split, f"{name}/{at}", data=jpeg(9 * value)) for at, value in enumerate(values)]
    write_shards(Reading("list", samples, {}), tmp_path / "out")
    found = open_index(tmp_path / "out").manifest.duplicates
    assert found is not None
    assert (found.groups, found.images, found.across_classes, found.across_splits) == (3, 7, 1, 1)
    assert sorted(found.examples[0]) == ["a/0", "b/0", "c/0"]  # what spoils most comes first
    listed = json.loads((tmp_path / "out/duplicates.json").read_text())
    groups = sorted(sorted((one["source"], one["class"], one["split"]) for one in group) for group in listed)
    assert groups[0] == [("a/0", "a", "train"), ("b/0", "b", "train"), ("c/0", "c", "test")]
    assert [[source for source, _, _ in group] for group in groups[1:]] == [["a/1", "a/2"], ["c/1", "c/2"]]
    assert cli.run(["data", "inspect", str(tmp_path / "out")]) == 0
    assert "3 groups of equal images (7 images), 1 groups lie in more than one split, 1 in more than one class" in capsys.readouterr().out


def test_pixels_decide_not_metadata_and_boxes_are_no_duplicates(tmp_path: Path) -> None:
    data = noise(exif=exif())
    samples = [
        Sample("a", "train", "a/0", data=PLAIN),
        Sample("a", "train", "a/1", data=PLAIN, box=(0, 0, 20, 20)),
        Sample("b", "train", "b/0", data=data),
        Sample("b", "train", "b/1", data=PLAIN, box=(20, 0, 40, 20)),
    ]
    write_shards(Reading("list", samples, {}), tmp_path / "out")
    index = open_index(tmp_path / "out")
    assert index.manifest.duplicates is not None
    assert [sorted(group) for group in index.manifest.duplicates.examples] == [["a/0", "b/0"]]
    assert SECRET not in b"".join(ShardReader(index).read(row) for row in range(4))


# ---------------------------------------------------------------- tables

BAD_TABLES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "has no column path, label, split; it has no header: the file is empty"),
    "a header alone": ("label,path,split\n", "csv holds no image"),
    "after blank lines": (OML.replace("1,images/2", "\n\n1,images/2").replace("3.jpg,train", "3.jpg,nix"), "line 7: split='nix'"),
    "after a field of two lines": (
        OML.replace("train,,,shoe,0", '"train",,,"sh\noe",0').replace("3.jpg,train", "3.jpg,nix"),
        "line 6: split",
    ),
    "UTF-16": (OML.encode("utf-16"), "is not UTF-8 text .*; save it as UTF-8"),
    "Latin-1": (OML.replace("shoe", "caf\xe9").encode("latin-1"), "is not UTF-8 text .*; save it as UTF-8"),
    "null": (OML.replace("3.jpg", "3\0.jpg"), "line 5: a null character"),
    "a field without end": (OML.replace("images/3", '"' + "x" * 200_000), r"line \d+: field larger than field limit"),
    "half a box": (OML.replace("0,6,0,12", "0,,0,12"), "line 2: the box .* has 3 of four numbers"),
    "a box without end": (OML.replace("0,6,0,12", "0,inf,0,12"), "line 2: the box .* is not four numbers"),
    "too few fields": (OML + "8,images/6.jpg\n", "line 9: split=''"),
}


@pytest.mark.parametrize("name", list(BAD_TABLES))
def test_bad_tables_give_one_message(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = BAD_TABLES[name]
    table = make_table(tmp_path / "src", "")
    table.write_bytes(content.encode() if isinstance(content, str) else content)
    assert cli.run(["data", "prepare", "csv", "--root", str(table), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said and len(said) < 600
    with pytest.raises(InputError, match=message):
        write_shards(read("csv", table), tmp_path / "out")


def test_a_table_with_a_byte_order_mark(tmp_path: Path) -> None:
    table = make_table(tmp_path / "src", "")
    table.write_bytes(b"\xef\xbb\xbf" + OML.replace("\n", "\r\n").encode())
    assert len(read("csv", table).samples) == 7
