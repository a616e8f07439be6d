"""Embeddings of many images: the same file from any number of processes and after a kill."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import dnc_dist
from dnc_dist.base import foreign
from dnc_dist.base.errors import InputError
from dnc_dist.data.listing import list_images
from dnc_dist.inference.table import Keys, Origin, read_table, write_table
from tests.inference_fixtures import CLASSES, PER_CLASS, refused, run, two_runs
from tests.run_fixtures import dnc, start


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_runs(tmp_path_factory)


@pytest.fixture(scope="module")
def long_list(place: Path) -> Path:
    """A list of about 1,150 paths, five blocks; two of its images cannot be read."""
    paths = sorted((place / "pictures").rglob("*.png"))
    (place / "damaged.jpg").write_bytes(b"\xff\xd8 no image")
    listed = [str(path.relative_to(place)) for path in paths * 8]
    listed.insert(300, "damaged.jpg")
    listed.append("damaged.jpg")
    (place / "list.txt").write_text("\n".join(listed))
    return place / "list.txt"


def killed_at(number: int) -> None:
    """For ``before``: the process is killed when it is about to write this block."""
    from dnc_dist.inference import embed

    write = embed.write_block

    def writing(path: Path, found: object) -> None:
        if path.name.startswith(f"block-{number:08d}-"):
            os.killpg(0, signal.SIGKILL)
        write(path, found)

    embed.write_block = writing


def killed_at_block_3() -> None:
    killed_at(3)


def test_the_file_of_a_folder(place: Path) -> None:
    keys, vectors = read_table(place / "all.parquet")
    paths = sorted((place / "pictures").rglob("*.png"))
    assert keys.keys == [path.relative_to(place / "pictures").as_posix() for path in paths]
    assert keys.paths == [str(path) for path in paths] and keys.classes == [path.parent.name for path in paths]
    np.testing.assert_array_equal(vectors, dnc_dist.load(place / "runs/one").embed(paths))
    table = pq.read_table(place / "all.parquet")
    assert table.column_names == ["key", "path", "class", "label", "embedding"]
    assert str(table.schema.field("embedding").type).startswith("fixed_size_list") and table.num_rows == len(paths)
    assert not (place / "all.parquet.parts").exists()


def test_a_prepared_data_set_gives_the_digits_of_its_evaluation(place: Path, tmp_path: Path) -> None:
    assert run("embed", place / "runs/one", place / "data", "--split", "test", "--out", tmp_path / "test.npy", "--nproc", "1") == 0
    keys, vectors = read_table(tmp_path / "test.npy")
    assert len(keys) == CLASSES // 2 * PER_CLASS and set(keys.classes) == {f"test{number}" for number in range(CLASSES // 2)}
    assert all(path is not None and Path(path).is_file() for path in keys.paths) and None not in keys.labels
    # Recall@1 from the file is that of the run.
    similarity = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    np.fill_diagonal(similarity, -2)
    right = np.array(keys.labels)[similarity.argmax(1)] == np.array(keys.labels)
    lines = [json.loads(line) for line in (place / "runs/one/metrics.jsonl").read_text().splitlines()]
    assert right.mean() == next(line["recall@1"] for line in lines if line["kind"] == "evaluation")


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_writes_the_same_bytes(
    place: Path, long_list: Path, tmp_path: Path, processes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for count in (1, processes):
        assert run("embed", place / "runs/one", long_list, "--out", tmp_path / f"{count}.parquet", "--nproc", str(count)) == 0
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / f"{processes}.parquet").read_bytes()
    err = capsys.readouterr().err
    total = CLASSES * PER_CLASS * 12 + 2
    assert f"warning: 2 of {total:,} images could not be read and are left out" in err and "damaged.jpg: UnidentifiedImageError" in err
    assert "embedding: " in err and " img/s" in err
    keys, vectors = read_table(tmp_path / "1.parquet")
    assert len(keys) == len(vectors) == total - 2 and [key for key, _ in keys.origin.unreadable] == ["damaged.jpg"] * 2


@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_after_a_kill_the_same_command_writes_the_same_file(place: Path, long_list: Path, tmp_path: Path, kind: str) -> None:
    command = ["embed", str(place / "runs/one"), str(long_list), "--nproc", "1", "--out"]
    assert run(*command, tmp_path / f"whole.{kind}") == 0
    out = tmp_path / f"killed.{kind}"
    running = start([*command, out], tmp_path, before=killed_at_block_3)
    assert running.wait().code == -signal.SIGKILL
    assert not out.exists() and len(list((tmp_path / f"{out.name}.parts").glob("block-*.npz"))) == 3
    done = dnc(*command, out, folder=tmp_path)
    assert done.code == 0 and "3 of 5 blocks are there already; it goes on" in done.err, done
    assert out.read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()
    if kind == "npy":
        assert out.with_suffix(".keys.json").read_bytes() == (tmp_path / "whole.keys.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if "parts" in path.name) == []


def test_vectors_never_stand_under_the_name_of_another_model(tmp_path: Path) -> None:
    """When a file cannot be written over another one, that one stays; and an array with the keys of another is refused."""
    out = tmp_path / "found.npy"

    def keys(model: str) -> Keys:
        return Keys(Origin(model, "run", "step-00000001", []), ["a", "b"], [None] * 2, [None] * 2, [None] * 2)

    def broken() -> Iterator[np.ndarray]:
        yield np.zeros((1, 3), np.float32)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_table(out, keys("first"), 3, [np.ones((2, 3), np.float32)])
    beside = out.with_suffix(".keys.json").read_bytes()
    with pytest.raises(OSError, match="No space left"):
        write_table(out, keys("second"), 3, broken())
    found, vectors = read_table(out)
    assert found == keys("first") and (vectors == 1).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.keys.json", "found.npy"]
    write_table(out, keys("second"), 3, [np.zeros((2, 3), np.float32)])
    out.with_suffix(".keys.json").write_bytes(beside)
    with pytest.raises(InputError, match=r"found\.keys\.json belongs to another file; write it again"):
        read_table(out)


@pytest.mark.slow
def test_blocks_of_other_images_or_another_model_are_not_used(place: Path, long_list: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    running = start(["embed", place / "runs/two", long_list, "--nproc", "1", "--out", out], tmp_path, before=killed_at_block_3)
    assert running.wait().code == -signal.SIGKILL
    done = dnc("embed", place / "runs/one", place / "pictures", "--nproc", "1", "--out", out, folder=tmp_path)
    assert done.code == 0 and "holds blocks of other images or of another model, which are removed" in done.err, done
    assert out.read_bytes() == (place / "all.parquet").read_bytes()


def test_a_table_says_the_classes(place: Path, tmp_path: Path) -> None:
    paths = sorted((place / "pictures").rglob("*.png"))[:5]
    lines = [f"{path},name {number}" for number, path in enumerate(paths)]
    (tmp_path / "some.csv").write_text("\n".join(["path,class", *lines]))
    assert run("embed", place / "runs/one", tmp_path / "some.csv", "--out", tmp_path / "some.npy", "--nproc", "1") == 0
    keys, vectors = read_table(tmp_path / "some.npy")
    assert keys.classes == [f"name {number}" for number in range(5)] and keys.paths == list(map(str, paths))
    whole, expected = read_table(place / "all.parquet")
    np.testing.assert_allclose(vectors, expected[: len(paths)], atol=5 * 128 * 9 * 2.0**-24)
    assert whole.paths[:5] == keys.paths


def test_a_list_is_split_at_the_ends_of_lines_only(tmp_path: Path) -> None:
    """A name may have what Unicode calls a separator of lines."""
    names = ["one\u2028two.png", "a\x0bb.png", "c\x85d.png"]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(b"%d" % number)
    (tmp_path / "list.txt").write_bytes("\r\n".join(names).encode())
    images = list_images(tmp_path / "list.txt")
    assert [read() for read in images.readers(0, len(images))] == [b"0", b"1", b"2"]


@pytest.mark.parametrize("name", ["found.npy", "found.parquet"])
def test_a_run_whose_name_is_no_utf_8(place: Path, tmp_path: Path, name: str) -> None:
    """What is written of it can be read again."""
    renamed = tmp_path / os.fsdecode(b"real-\xff")
    shutil.copytree(place / "runs/one", renamed)
    image = next((place / "pictures").rglob("*.png"))
    assert run("embed", renamed, image, "--out", tmp_path / name) == 0
    assert read_table(tmp_path / name)[0].origin.run == f"{tmp_path}/real-\\xff"
    assert run("export", renamed, "--out", tmp_path / "model") == 0
    assert dnc_dist.load(tmp_path / "model").origin.run == "real-\\xff"


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_an_image_is_not_left_out_because_the_machine_fails(
    place: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted((place / "pictures").rglob("*.png"))[:3]
    original = foreign._open_regular

    def failing(path: Path) -> object:
        if path == paths[1]:
            raise OSError(number, os.strerror(number), str(path))
        return original(path)

    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    with monkeypatch.context() as patch:
        patch.setattr(foreign, "_open_regular", failing)
        assert run("embed", place / "runs/one", tmp_path / "list.txt", "--out", tmp_path / "found.npy") == 1
        assert f"{paths[1]}: {os.strerror(number)}" in capsys.readouterr().err and not (tmp_path / "found.npy").exists()
    assert run("embed", place / "runs/one", tmp_path / "list.txt", "--out", tmp_path / "found.npy") == 0
    assert len(read_table(tmp_path / "found.npy")[0]) == 3


def test_wrong_input_of_embed(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, out = place / "runs/one", tmp_path / "out.parquet"
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"nothing")
    (tmp_path / "list.txt").write_text("none.jpg\n")
    (tmp_path / "table.csv").write_text("file,label\n")
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)))
    (tmp_path / "taken.parquet.parts").mkdir()
    (tmp_path / "taken.parquet.parts" / "letter.txt").write_text("mine")
    for data, target, message in (
        (tmp_path / "none", out, "none does not exist or is no regular file; give a folder of images"),
        (tmp_path / "empty", out, "empty holds no image; images are files that end in .jpeg, .jpg, .png, .webp"),
        (tmp_path / "broken", out, "can be read; the first is a.jpg (UnidentifiedImageError"),
        (tmp_path / "list.txt", out, "1 of 1 files that "),
        (tmp_path / "table.csv", out, "has no column path; it has file, label"),
        (tmp_path / "noise.bin", out, "noise.bin is neither an image nor a list of paths; give"),
        (place / "pictures", tmp_path / "empty.npy" / "x.txt", "does not end in .parquet or .npy"),
        (place / "pictures", tmp_path / "taken.parquet", "is in the way, and no `dnc-dist embed` made it"),
    ):
        assert message in refused(capsys, "embed", one, data, "--out", target, "--nproc", "1"), message
        assert not out.exists() and not (tmp_path / "out.parquet.parts").exists()
    (tmp_path / "folder.npy").mkdir()
    assert "folder.npy is a folder" in refused(capsys, "embed", one, place / "pictures", "--out", tmp_path / "folder.npy")
    assert "--split test needs a data set" in refused(capsys, "embed", one, place / "pictures", "--split", "test", "--out", out)
    assert "is no run directory" in refused(capsys, "embed", place, place / "pictures", "--out", out)
    message = "data is a prepared data set; give images, or folders of images"  # its contact sheet is no query
    assert message in refused(capsys, "search", one, place / "data", "--index", place / "all.index")
    assert "has no checkpoint step-9" in refused(capsys, "embed", one, place / "pictures", "--checkpoint", "step-9", "--out", out)
