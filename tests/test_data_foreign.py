"""A data set that somebody else made: whatever its files hold, it is a usable data set or one message."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dnc_dist.base.errors import InputError
from dnc_dist.data.index import DatasetIndex, open_index, train_view, validation_view
from dnc_dist.data.manifest import COLUMNS
from dnc_dist.data.readers import Reading, Sample
from dnc_dist.data.rows import ShardReader
from dnc_dist.data.shards import write_shards
from dnc_dist.data.stream import SequentialBatches
from dnc_dist.data.summary import contact_sheet, describe
from dnc_dist.data.transforms import Geometry


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    samples = []
    for name, split in {"a": "train", "b": "train", "c": "test"}.items():
        for number in range(3):
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(buffer, "JPEG")
            lists = (("lists", "small large" if number else "large"),)
            samples.append(Sample(name, split, f"{name}/{number}", data=buffer.getvalue(), extra=lists))
    out = tmp_path_factory.mktemp("foreign") / "out"
    write_shards(Reading("list", samples, {}), out)
    return out


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "data")


def manifest(**changes: Any) -> Callable[[Path], None]:
    """A manifest with other values; ``shard`` are those of its first shard, None leaves a key out."""

    def change(root: Path) -> None:
        values = json.loads((root / "manifest.json").read_text())
        values["shards"][0] |= changes.get("shard", {})
        values |= {name: value for name, value in changes.items() if name != "shard"}
        (root / "manifest.json").write_text(json.dumps({name: value for name, value in values.items() if value is not None}))

    return change


def column(name: str, row: int | slice, value: Any, dtype: Any = None) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / "index" / f"{name}.npy"
        array = np.load(path)
        array = array.astype(dtype or array.dtype)
        array[row] = value
        np.save(path, array, allow_pickle=True)

    return change


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(content.encode() if isinstance(content, str) else content)  # type: ignore[return-value]


def swapped(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).unlink()
        make(root / name)

    return change


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (66,)


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "shard elsewhere": (manifest(shard={"name": "/etc/passwd"}), r"manifest\.json is damaged: a train shard is called '/etc/passwd'"),
    "shard above": (manifest(shard={"name": "../x/train-000000.tar"}), "a train shard is called"),
    "shard is another file": (manifest(shard={"name": "classes.json"}), "a train shard is called"),
    "shard of another split": (manifest(shard={"split": "test"}), "a test shard is called 'train-000000.tar'"),
    "shard twice": (manifest(shard={"name": "train-000001.tar"}), "named twice"),
    "no rows": (manifest(shard={"rows": 0}), "has 0 rows"),
    "rows below zero": (manifest(shard={"rows": -1}), "has -1 rows"),
    "rows without end": (manifest(shard={"rows": 10**30}), "its splits say otherwise"),
    "rows as text": (manifest(shard={"rows": "3"}), "should be a valid integer"),
    "rows as truth": (manifest(shard={"rows": True}), "should be a valid integer"),
    "bytes not a number": (manifest(shard={"bytes": float("nan")}), "should be a valid integer"),
    "bytes without end": (manifest(shard={"bytes": float("inf")}), "should be a valid integer"),
    "all counts alike but too many": (manifest(num_rows=10**12), "num_rows is 1000000000000"),
    "a split that is none": (manifest(splits={"../x": {"rows": 1, "classes": 1}}), "splits"),
    "splits missing": (manifest(splits=None), r"splits: Field required"),
    "column elsewhere": (manifest(extra_columns=["../../x"]), r"an extra column is called '../../x'"),
    "column of the index": (manifest(extra_columns=["label"]), "an extra column is called 'label'"),
    "column missing": (manifest(extra_columns=["camera"]), r"camera\.npy cannot be read"),
    "no object": (text("manifest.json", "[1]"), "is damaged"),
    "deep": (text("manifest.json", "[" * 100_000), "is damaged"),
    "no text": (text("manifest.json", b"\xff\xfe\x00"), "is damaged"),
    "half a character": (text("classes.json", '["a", "b", "\\ud800"]'), r"classes\.json is damaged"),
    "classes missing": (lambda root: (root / "classes.json").unlink(), r"classes\.json cannot be read"),
    "classes no texts": (text("classes.json", "[1, 2, 3]"), "valid string"),
    "too few classes": (text("classes.json", '["a", "b"]'), r"label\.npy is damaged: a label is not one of the 2"),
    "a pipe": (swapped("classes.json", os.mkfifo), "no regular file"),
    "a pipe as column": (swapped("index/label.npy", os.mkfifo), "no regular file"),
    "a pipe as shard": (swapped("train-000000.tar", os.mkfifo), "is missing"),
    "a folder as shard": (swapped("train-000000.tar", os.mkdir), "is missing"),
    "a link to a short file": (swapped("train-000000.tar", lambda path: path.symlink_to("/etc/passwd")), "bytes instead of"),
    "label below zero": (column("label", 2, -1), "a label is not one of"),
    "label too large": (column("label", 2, 3), "a label is not one of"),
    "labels no numbers": (column("label", 2, np.nan, np.float64), "an array of float64"),
    "code": (column("label", 0, _Code(), object), r"label\.npy is damaged"),
    "split unknown": (column("split", 0, 7), r"split\.npy is damaged"),
    "shard number": (column("shard", 0, 9), r"shard\.npy is damaged"),
    "shard number below zero": (column("shard", 0, -1), r"shard\.npy is damaged"),
    "rows out of order": (column("shard", slice(None), [1, 1, 1, 0, 0, 0, 2, 2, 2]), r"shard\.npy is damaged"),
    "offset below zero": (column("offset", 1, -8), "an image lies outside"),
    "offset beyond the end": (column("offset", 1, 10**9), "an image lies outside"),
    "offset that overflows": (column("offset", 1, 2**63 - 1), "an image lies outside"),
    "size beyond the end": (column("size", 1, 2**62), "an image is empty or larger"),
    "size zero": (column("size", 1, 0), "an image is empty or larger"),
    "too few rows": (lambda root: np.save(root / "index/size.npy", np.ones(4, np.int64)), "has 4 rows instead of 9"),
    "two dimensions": (lambda root: np.save(root / "index/size.npy", np.ones((9, 1), np.int64)), r"2 dimension\(s\)"),
    "an archive": (text("index/size.npy", b"PK\x03\x04" + bytes(60)), r"size\.npy is damaged"),
    "a header of its own": (
        text("index/size.npy", b"\x93NUMPY\x01\x00\x46\x00{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999,), }\n    "),
        r"size\.npy is damaged",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_one_message(name: str, root: Path) -> None:
    change, message = BAD[name]
    change(root)
    with pytest.raises(InputError, match=message) as caught:
        open_index(root)
    assert str(root) in str(caught.value) and len(str(caught.value)) < 700


def test_what_is_no_harm(root: Path) -> None:
    """Bytes that are no text, an unknown key, a data set from before duplicates were looked for, shards as links."""
    column("source", 0, b"\xff\xfe/")(root)
    column("lists", 6, b"\xe9 large", "S40")(root)
    manifest(duplicates=None, later="x")(root)
    shard = root / "train-000000.tar"
    shard.rename(root.parent / "elsewhere")
    shard.symlink_to(root.parent / "elsewhere")
    use(open_index(root))
    assert open_index(root).key(0) == r"000000000 (\xff\xfe/)"


def many_rows(root: Path, count: int) -> None:
    """One shard with so many rows of one byte each, a hole on the disk."""
    for name in (*COLUMNS, "lists"):
        array = np.load(root / "index" / f"{name}.npy")
        np.save(root / "index" / f"{name}.npy", np.repeat(array[:1], count))
    np.save(root / "index/offset.npy", np.arange(count))
    np.save(root / "index/size.npy", np.ones(count, np.int64))
    os.truncate(root / "train-000000.tar", count)
    shard = {"name": "train-000000.tar", "split": "train", "rows": count, "bytes": count}
    manifest(num_rows=count, shards=[shard], splits={"train": {"rows": count, "classes": 1}})(root)


def test_a_million_rows_are_checked_in_passes_over_whole_arrays(root: Path) -> None:
    calls = []
    for count in (10, 1_000_000):
        many_rows(root, count)
        calls.append(0)

        def called(*_: Any) -> None:
            calls[-1] += 1

        sys.setprofile(called)
        try:
            assert len(open_index(root)) == count
        finally:
            sys.setprofile(None)
    assert calls[1] < calls[0] + 1000, "a function is called for every row"


def use(index: DatasetIndex) -> None:
    """All that is done with an index before and while it is trained on."""
    describe(index)
    for view in (train_view(index, 0.0), validation_view(index, 0.0), *(index.view(split) for split in index.splits)):
        if view is not None:
            assert len(view.labels) == len(view)
    reader = ShardReader(index)
    for row in range(len(index)):
        assert len(reader.read(row)) == index.columns["size"][row]
        index.key(row)
    reader.close()


FILES = ["manifest.json", "classes.json", *(f"index/{name}.npy" for name in (*COLUMNS, "lists"))]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["../x", [], {}, [[]]]),
)


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, Any]:
    """(file, what is done to it): bytes that are overwritten, cut or put in, or one value of a JSON file replaced or dropped."""
    name = draw(st.sampled_from(FILES))
    if name.endswith(".json") and draw(st.booleans()):
        return name, ("value", draw(st.integers(0, 99)), draw(st.booleans()), draw(VALUES))
    return name, draw(
        st.one_of(
            st.tuples(st.just("over"), st.integers(0, 2000), st.binary(min_size=1, max_size=8)),
            st.tuples(st.just("cut"), st.integers(0, 2000)),
            st.tuples(st.just("in"), st.integers(0, 2000), st.binary(min_size=1, max_size=40)),
        )
    )


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in inside for place in ((value, key), *places(part))]


def damaged(data: bytes, how: tuple[Any, ...]) -> bytes:
    if how[0] == "value":
        value = json.loads(data)
        found = places(value)
        container, key = found[how[1] % len(found)]
        if how[2]:
            del container[key]
        else:
            container[key] = how[3]
        return json.dumps(value).encode()
    at = how[1] % len(data)
    before, after = data[:at], data[at:]
    if how[0] == "cut":
        return before
    return before + how[2] + (after if how[0] == "in" else after[len(how[2]) :])


def fuzz(whole: Path, place: Path, name: str, how: tuple[Any, ...]) -> None:
    """Open and use the data set with one damaged file: nothing but an InputError may come of it."""
    if not (place / "index").exists():
        shutil.copytree(whole, place, dirs_exist_ok=True)
    original = (whole / name).read_bytes()
    (place / name).write_bytes(damaged(original, how))
    try:
        use(open_index(place))
    except InputError as error:
        assert "\n" not in str(error)
    finally:
        (place / name).write_bytes(original)


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=60, **QUIET)
@given(damages())
def test_fuzz(whole: Path, tmp_path_factory: pytest.TempPathFactory, damage: tuple[str, tuple[Any, ...]]) -> None:
    fuzz(whole, whole.parent / "fuzzed", *damage)


@pytest.mark.slow
@settings(max_examples=1500, **{**QUIET, "derandomize": False})
@given(damages())
def test_fuzz_for_long(whole: Path, damage: tuple[str, tuple[Any, ...]]) -> None:
    fuzz(whole, whole.parent / "fuzzed", *damage)


@pytest.mark.parametrize("name", [b"000000000.txt", b"../../../x.jpg", b"000000000.a.jpg", b"000000001.jpg", b"no header"])
def test_a_foreign_tar_gives_one_message(root: Path, name: bytes) -> None:
    """Members with other names, a name twice, or what is no tar at all: sizes as the manifest says."""
    shard = root / "train-000000.tar"
    data = shard.read_bytes()
    header = bytearray(data[:512])
    header[:100] = name.ljust(100, b"\0")
    header[148:156] = b" " * 8
    if name != b"no header":  # as it is now, its checksum is wrong
        header[148:156] = f"{sum(header):06o}\0 ".encode()
    shard.write_bytes(bytes(header) + data[512:])
    index = open_index(root)
    with pytest.raises(InputError, match=r"train-000000\.tar\b.* copy the data set again") as caught:
        list(SequentialBatches(index, index.view("train"), Geometry(None, 8), block_size=4))
    assert "\n" not in str(caught.value)


def test_whatever_the_names_are_the_contact_sheet_is_drawn(root: Path) -> None:
    text("classes.json", json.dumps(["\0\n\x1b[2J", "\u202e\U0001f600" * 50, ""]))(root)
    assert contact_sheet(open_index(root)).size[0] > 0
