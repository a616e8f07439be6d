"""After training: embed, index, search, export. The same file from any number of processes and after a kill; each image finds itself."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import dnc_dist
from dnc_dist import cli
from dnc_dist.base.errors import InputError
from dnc_dist.base.files import replacing
from dnc_dist.inference import export as inference_export
from dnc_dist.inference.index import VectorIndex
from dnc_dist.inference.table import Keys, Origin, read_table, write_table
from tests.run_fixtures import dnc, draw_folder, start, without_report, write_config

CLASSES, PER_CLASS, DIM = 8, 12, 16
BATCH = 16
"""Of the evaluation; a block has 256 images."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``pictures``, the prepared ``data``, the runs ``one`` and ``two``, and what is made of the first."""
    folder = tmp_path_factory.mktemp("inference")
    train = {f"train{number}": PER_CLASS for number in range(CLASSES)}
    draw_folder(folder / "pictures", train, {f"test{number}": PER_CLASS for number in range(CLASSES // 2)})
    assert dnc("data", "prepare", "folder", "--root", "pictures", "--out", "data", folder=folder).code == 0
    for name, seed in (("one", 0), ("two", 1)):
        changes = {"run": {"seed": seed}, "schedule": {"epochs": 1}, "evaluation": {"batch_size": BATCH, "nmi": "never"}}
        write_config(folder, Path("data"), name, **changes, division={"num_learners": 1, "conquer_from": None})
        done = dnc("train", f"{name}.yaml", folder=folder, before=without_report)
        assert done.code == 0, done
    assert run("embed", folder / "runs/one", folder / "pictures", "--out", folder / "all.parquet", "--nproc", "1") == 0
    assert run("index", folder / "all.parquet", "--out", folder / "all.index") == 0
    return folder


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


@pytest.mark.parametrize("name", ["found.npy", "found", "./found.npy"])
def test_an_index_never_replaces_its_embeddings(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`found` would: its keys go to found.keys.json, where those of found.npy are."""
    source = tmp_path / "found.npy"
    keys = Keys(Origin("model", "run", "step-00000001", []), ["a"], [None], [None], [None])
    write_table(source, keys, 2, [np.ones((1, 2), np.float32)])
    assert "which the embeddings are in; give another name" in refused(capsys, "index", source, "--out", f"{tmp_path}/{name}")
    assert read_table(source)[0] == keys


def test_an_export_that_cannot_be_written_leaves_the_one_before(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model"
    assert run("export", place / "runs/one", "--out", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*given: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(inference_export, "replacing", lambda path: full() if path.name == "README.md" else replacing(path))
        assert run("export", place / "runs/two", "--out", out) == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run("export", out, "--out", out) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


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


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_every_image_of_the_index_finds_itself_first(place: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("index", place / "all.parquet", "--out", tmp_path / "one.index", "--kind", kind) == 0
    capsys.readouterr()
    assert run("search", place / "runs/one", place / "pictures", "--index", tmp_path / "one.index", "--top", "3", "--json") == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    images = sorted((place / "pictures").rglob("*.png"))
    firsts = {hit["query"]: hit for hit in hits if hit["rank"] == 1}
    assert list(firsts) == [str(path) for path in images] and len(hits) == 3 * len(images)
    # The drawn images all differ, so that none shares the first place.
    assert [hit["path"] for hit in firsts.values()] == [str(path) for path in images]
    assert all(1 - hit["similarity"] < 2.0**-20 for hit in firsts.values())
    ranked = [hit["similarity"] for hit in hits]
    assert all(left >= right for left, right, hit in zip(ranked, ranked[1:], hits[1:], strict=False) if hit["rank"] > 1)


def test_hits_are_those_of_brute_force_and_ties_are_ordered_by_row(place: Path, tmp_path: Path) -> None:
    _, vectors = read_table(place / "all.parquet")
    found = VectorIndex(place / "all.index").search(vectors, 5)
    exact = ((vectors[:, None].astype(np.float64) - vectors[None]) ** 2).sum(2)
    for at in range(len(vectors)):
        order = np.lexsort((np.arange(len(vectors)), exact[at]))[:5]
        # Sums in another order may differ in the last digit of float64.
        np.testing.assert_allclose(exact[at][found.rows[at]], exact[at][order], rtol=DIM * 2.0**-52, atol=0)
    assert found.rows[:, 0].tolist() == list(range(len(vectors)))
    assert len(VectorIndex(place / "all.index").search(vectors[:0], 5).rows) == 0


def test_the_table_and_the_contact_sheet(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = place / "pictures/test/test0/0.png"
    (tmp_path / "bad.png").write_bytes(b"no image")
    sheet = tmp_path / "sheets" / "found.png"
    arguments = [place / "runs/one", query, tmp_path / "bad.png", "--index", place / "all.index", "--top", "4", "--sheet", sheet]
    assert run("search", *arguments) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["query", "rank", "similarity", "class", "key"] and len(lines) == 5
    assert lines[1].split() == [str(query), "1", "1.0000", "test0", "test/test0/0.png"]
    assert "bad.png could not be read and is left out: UnidentifiedImageError" in err and "contact sheet: " in err
    with Image.open(sheet) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).astype(float)
    # The first hit is the query, and so is its picture: right of the line there are the same pixels.
    cell = pixels[8 : 8 + 112, 8 : 8 + 112]
    np.testing.assert_array_equal(pixels[8 : 8 + 112, 136 : 136 + 112], cell)
    assert cell.std() > 1


def test_an_index_of_another_model_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = place / "pictures/test/test0/0.png"
    message = refused(capsys, "search", place / "runs/two", query, "--index", place / "all.index")
    assert "is another model, whose embeddings cannot be compared with those" in message and str(place / "runs/one") in message
    shutil.copy(place / "all.index", tmp_path / "alone.index")
    assert "alone.index.keys.json is missing" in refused(capsys, "search", place / "runs/one", query, "--index", tmp_path / "alone.index")
    shutil.copy(place / "all.index.keys.json", tmp_path / "alone.index.keys.json")
    with (tmp_path / "alone.index").open("ab") as file:
        file.write(b"x")
    assert "alone.index is damaged" in refused(capsys, "search", place / "runs/one", query, "--index", tmp_path / "alone.index")
    for arguments, text in (
        ([place / "none.png", "--index", place / "all.index"], "none.png does not exist; give images"),
        ([query, "--index", place / "none.index"], "none.index cannot be read (No such file or directory)"),
        ([query, "--index", place / "all.index", "--sheet", tmp_path / "x.jpg"], "is no name of a PNG file"),
        ([place / "damaged.png", "--index", place / "all.index"], "no query can be read"),
    ):
        (place / "damaged.png").write_bytes(b"no image")
        assert text in refused(capsys, "search", place / "runs/one", *arguments)
    (place / "damaged.png").unlink()
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and nothing else")
    assert "damaged.parquet is damaged" in refused(capsys, "index", tmp_path / "damaged.parquet", "--out", tmp_path / "x.index")
    assert "is no file of embeddings" in refused(capsys, "index", place / "one.yaml", "--out", tmp_path / "x.index")
    assert f"{tmp_path} is a folder" in refused(capsys, "index", place / "all.parquet", "--out", tmp_path)


def test_an_export_is_loaded_as_the_run_is(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    assert run("export", place / "runs/one", "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.yaml", "model.safetensors"]
    original, model = dnc_dist.load(place / "runs/one"), dnc_dist.load(out)
    images = sorted((place / "pictures/test").rglob("*.png"))
    np.testing.assert_array_equal(model.embed(images), original.embed(images))
    np.testing.assert_array_equal(model.features(images), original.features(images))
    assert model.fingerprint == original.fingerprint and (model.checkpoint, model.epoch) == (original.checkpoint, 1)
    assert str(place) not in (out / "config.yaml").read_text() + (out / "README.md").read_text()
    assert original.state is not None
    text = (out / "README.md").read_text()
    assert f"| recall@1 | {original.state.metrics['recall@1']:.4f} |" in text and "protocol `leave-one-out`" in text
    assert f"train: {CLASSES * PER_CLASS} images of {CLASSES} classes" in text and "| loss | margin |" in text
    # It takes the place of the run in every command, also for an index that was made with the run.
    capsys.readouterr()
    assert run("search", out, images[0], "--index", place / "all.index", "--top", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(images[0])
    assert run("export", out, "--out", out.with_name("again")) == 0
    assert dnc_dist.load(out.with_name("again")).fingerprint == original.fingerprint
    # Again into the same folder; but into no other.
    assert run("export", place / "runs/one", "--out", out) == 0
    assert "which no export has" in refused(capsys, "export", place / "runs/one", "--out", place / "runs/one")
    assert "is a file; give a folder" in refused(capsys, "export", place / "runs/one", "--out", place / "one.yaml")
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-100])
    assert "model.safetensors is damaged" in refused(capsys, "export", out, "--out", tmp_path / "third")


def test_onnx_computes_the_same(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime
    import torch

    assert run("export", place / "runs/one", "--out", tmp_path / "model", "--onnx") == 0
    told = re.search(r"largest difference from torch in a coordinate ([0-9.e-]+)", capsys.readouterr().out)
    assert told is not None and float(told[1]) < 1e-3
    model = dnc_dist.load(tmp_path / "model")
    session = onnxruntime.InferenceSession(str(tmp_path / "model/model.onnx"), providers=["CPUExecutionProvider"])
    images = sorted((place / "pictures/test").rglob("*.png"))
    for some in (images[:1], images):
        # Prepared as the card says.
        data = model.cfg.data
        raw = np.stack([np.asarray(Image.open(path).convert("RGB").resize((data.image_size, data.image_size))) for path in some])
        pixels = ((raw.astype(np.float32) / 255 - np.float32(data.mean)) / np.float32(data.std)).transpose(0, 3, 1, 2)
        (found,) = session.run(["embedding"], {"pixels": np.ascontiguousarray(pixels)})
        np.testing.assert_allclose(found, model.embed(list(raw)), atol=5 * 128 * 9 * 2.0**-24)
    assert "model.onnx" in (tmp_path / "model/README.md").read_text() and isinstance(torch.__version__, str)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "masks", "size"), [("conv4", "sliced", 32), ("resnet18", "fixed", 64), ("vit_tiny_patch16_224", "learned", 224)]
)
def test_onnx_of_other_networks(tmp_path: Path, backbone: str, masks: str, size: int) -> None:
    pytest.importorskip("onnxruntime")
    import torch

    from dnc_dist.embedder import Embedder, Exported
    from dnc_dist.engine.network import build_network
    from dnc_dist.inference.onnx import onnx_bytes
    from tests.engine_fixtures import config

    changes = {"backbone": backbone, "masks": masks, "embedding_dim": DIM, "batch_norm": "frozen"}
    mode = "flat" if masks == "sliced" else "hierarchical"
    cfg = config(tmp_path, tmp_path / "run", model=changes, data={"image_size": size}, division={"num_learners": 4, "mode": mode})
    network = build_network(cfg, initial_weights=False)
    model = Embedder(network, cfg, tmp_path, Exported("run", "step-00000001", 0, 4), torch.device("cpu"), None)
    content, difference = onnx_bytes(model)
    assert content and 0 <= difference < 1e-4


def test_without_its_packages_onnx_says_what_to_install(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dnc_dist.inference import onnx

    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None)
    message = refused(capsys, "export", place / "runs/one", "--out", tmp_path / "model", "--onnx")
    assert "--onnx needs onnx, onnxscript, onnxruntime" in message and "pip install 'dnc-dist[onnx]'" in message
    assert not (tmp_path / "model").exists()


def test_faiss_kinds_are_what_they_are_called(place: Path, tmp_path: Path) -> None:
    kinds: Sequence[tuple[str, type]] = [("flat", faiss.IndexFlat), ("ivf", faiss.IndexIVFFlat), ("hnsw", faiss.IndexHNSWFlat)]
    for kind, class_ in kinds:
        assert run("index", place / "all.parquet", "--out", tmp_path / kind, "--kind", kind) == 0
        index = faiss.downcast_index(faiss.read_index(str(tmp_path / kind)))
        assert isinstance(index, class_) and index.metric_type == faiss.METRIC_INNER_PRODUCT
