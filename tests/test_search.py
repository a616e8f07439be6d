"""Index and search: every image finds itself first, hits are those of brute force, and an index of another model is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import pytest
from PIL import Image

from dnc_dist.inference import index as inference_index
from dnc_dist.inference.index import VectorIndex
from dnc_dist.inference.table import Keys, Origin, read_table, write_table
from tests.inference_fixtures import DIM, refused, run, two_runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_runs(tmp_path_factory)


@pytest.mark.parametrize("name", ["found.npy", "found", "./found.npy"])
def test_an_index_never_replaces_its_embeddings(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`found` would: its keys go to found.keys.json, where those of found.npy are."""
    source = tmp_path / "found.npy"
    keys = Keys(Origin("model", "run", "step-00000001", []), ["a"], [None], [None], [None])
    write_table(source, keys, 2, [np.ones((1, 2), np.float32)])
    assert "which the embeddings are in; give another name" in refused(capsys, "index", source, "--out", f"{tmp_path}/{name}")
    assert read_table(source)[0] == keys


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_every_image_of_the_index_finds_itself_first(place: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("index", place / "all.parquet", "--out", tmp_path / "one.index", "--kind", kind) == 0
    capsys.readouterr()
    assert run("search", place / "runs/one", place / "pictures", "--index", tmp_path / "one.index", "--top", "3", "--json") == 0
    out, err = capsys.readouterr()
    hits = [json.loads(line) for line in out.splitlines()]
    images = sorted((place / "pictures").rglob("*.png"))
    assert f"embedding: {len(images)}/{len(images)} img" in err
    firsts = {hit["query"]: hit for hit in hits if hit["rank"] == 1}
    assert list(firsts) == [str(path) for path in images] and len(hits) == 3 * len(images)
    # The drawn images all differ, so that none shares the first place.
    assert [hit["path"] for hit in firsts.values()] == [str(path) for path in images]
    assert all(1 - hit["similarity"] < 2.0**-20 for hit in firsts.values())
    ranked = [hit["similarity"] for hit in hits]
    assert all(left >= right for left, right, hit in zip(ranked, ranked[1:], hits[1:], strict=False) if hit["rank"] > 1)


def test_a_long_index_grows_in_parts(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inference_index, "_PART", 50)
    rows = len(read_table(place / "all.parquet")[0])
    assert rows % 50
    assert run("index", place / "all.parquet", "--out", tmp_path / "one.index") == 0
    assert f"indexing: {rows}/{rows} rows" in capsys.readouterr().err
    assert (tmp_path / "one.index").read_bytes() == (place / "all.index").read_bytes()


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


def test_faiss_kinds_are_what_they_are_called(place: Path, tmp_path: Path) -> None:
    kinds: Sequence[tuple[str, type]] = [("flat", faiss.IndexFlat), ("ivf", faiss.IndexIVFFlat), ("hnsw", faiss.IndexHNSWFlat)]
    for kind, class_ in kinds:
        assert run("index", place / "all.parquet", "--out", tmp_path / kind, "--kind", kind) == 0
        index = faiss.downcast_index(faiss.read_index(str(tmp_path / kind)))
        assert isinstance(index, class_) and index.metric_type == faiss.METRIC_INNER_PRODUCT
