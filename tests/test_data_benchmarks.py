"""The readers of the published benchmarks: the archives' layouts, known counts, and one message for every bad tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from dnc_dist import cli
from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.data.index import open_index
from dnc_dist.data.readers import read
from dnc_dist.data.readers.benchmark import Counts
from dnc_dist.data.rows import ShardReader
from dnc_dist.data.shards import write_shards
from tests.benchmark_fixtures import CAR_NAMES, TREES, make_cub200, make_inshop

SMALL = {"train": Counts(24, 6), "test": Counts(12, 3)}


@pytest.mark.parametrize("layout", list(TREES))
def test_round_trip(layout: str, tmp_path: Path) -> None:
    reader, make = TREES[layout]
    root = make(tmp_path / "src")
    assert write_shards(read(reader, root, counts="any"), tmp_path / "out")
    index = open_index(tmp_path / "out")
    train, test = index.view("train"), index.view("test")
    assert (len(train), train.num_classes, len(test), test.num_classes) == (24, 6, 12, 3)
    assert set(np.bincount(train.labels)) == set(np.bincount(test.labels)) == {4}
    assert not set(train.class_names) & set(test.class_names)
    assert train.query.all() and train.gallery.all()
    if reader == "inshop":
        assert (test.query ^ test.gallery).all() and test.query.sum() == 6
    else:
        assert test.query.all() and test.gallery.all()
    sources = [source.decode() for source in index.columns["source"]]
    assert len(set(sources)) == 36
    files = ShardReader(index)
    assert all(files.read(row) == (root / source).read_bytes() for row, source in enumerate(sources))


def test_classes_and_super_classes_are_those_of_the_archives(tmp_path: Path) -> None:
    found = {}
    for layout, (reader, make) in TREES.items():
        samples = read(reader, make(tmp_path / layout), counts="any").samples
        found[layout] = {sample.source: (sample.class_name, dict(sample.extra).get("super_class")) for sample in samples}
    assert found["cub200"]["images/001.Some_Bird_1/Some_Bird_1_0040_1.jpg"] == ("001.Some_Bird_1", None)
    assert found["cars196"]["car_ims/000036.jpg"] == (f"196.{CAR_NAMES[195]}", None)
    # The same images in two folders: the published split of images has no say.
    assert Counter(found["cars196"].values()) == Counter(found["cars196_devkit"].values())
    assert found["sop"]["toaster_final/111085122873_1.JPG"] == ("2", "toaster")
    assert found["inshop"]["img/WOMEN/Dresses/id_00000102/03_1_front.jpg"] == ("id_00000102", "WOMEN/Dresses")


@pytest.mark.parametrize("layout", list(TREES))
def test_counts(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reader, make = TREES[layout]
    root = make(tmp_path / "src")
    prepare = ["data", "prepare", reader, "--root", str(root), "--out", str(tmp_path / "out")]
    assert cli.run(prepare) == 2
    said = capsys.readouterr().err
    published = parts.load("reader", reader).published
    assert said.startswith("error: not the published ") and "--counts any" in said
    assert f"has 24 images of 6 classes, published are {published['train']}" in said
    assert cli.run([*prepare, "--counts", "any"]) == 0
    assert f"{reader}: not as published: train" in capsys.readouterr().out
    known = {"train": Counts(24, 6), "query": Counts(6, 3), "gallery": Counts(6, 3)} if reader == "inshop" else SMALL
    monkeypatch.setattr(parts.load("reader", reader), "published", known)
    assert cli.run(prepare) == 0
    said = capsys.readouterr().out
    assert f"{reader}: as published: train" in said and "nothing to do" in said  # what counts are asked for is not part of the data


def test_the_published_counts_add_up() -> None:
    """Totals that the archives' own pages give."""
    totals = {"cub200": (11_788, 200), "cars196": (16_185, 196), "sop": (120_053, 22_634)}
    for reader, total in totals.items():
        assert tuple(np.sum(list(parts.load("reader", reader).published.values()), axis=0)) == total
    inshop = parts.load("reader", "inshop").published
    assert sum(counts.images for counts in inshop.values()) == 52_712
    assert inshop["train"].classes + inshop["query"].classes == 7_982


@pytest.mark.parametrize(("images", "listed_in"), [("img", "."), ("Img/img", "Eval"), ("Img/img", ".")])
def test_the_folders_of_inshop(images: str, listed_in: str, tmp_path: Path) -> None:
    root = make_inshop(tmp_path / "src", images=images, listed_in=listed_in)
    samples = read("inshop", root, counts="any").samples
    assert len(samples) == 36 and {sample.source.split("/")[0] for sample in samples} == {"img"}
    assert samples[0].location().is_relative_to(root / images)


def test_the_list_of_cars_with_labels_may_lie_in_devkit(tmp_path: Path) -> None:
    root = TREES["cars196_devkit"][1](tmp_path / "src")
    name = "cars_test_annos_withlabels.mat"
    (root / name).rename(root / "devkit" / name)
    assert len(read("cars196", root, counts="any").samples) == 36


def test_the_root_must_be_the_archives_folder(tmp_path: Path) -> None:
    root = make_cub200(tmp_path / "CUB_200_2011")
    archive = tmp_path / "CUB_200_2011.tgz"
    archive.write_bytes(b"x")
    for wrong, message in (
        (tmp_path, rf"did you mean --root {root}\?"),
        (root / "images", rf"did you mean --root {root}\?"),
        (archive, r"is a file; unpack it \(`tar xf CUB_200_2011\.tgz`\)"),
        (root / "images.txt", "is a file; give the folder of CUB_200_2011"),
        (tmp_path / "nowhere", "is not there; give the folder of CUB_200_2011"),
        (root / "images/001.Some_Bird_1", r"another folder: images\.txt is missing; .*; give the folder"),
    ):
        with pytest.raises(InputError, match=message):
            read("cub200", wrong, counts="any")


def _edit(file: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / file
        path.write_bytes(change(path.read_bytes().decode()).encode())

    return edit


def _annotations(file: str, **values: object) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        row = np.empty((1, 1), [(name, object) for name in values])
        for name, value in values.items():
            row[0, 0][name] = value
        savemat(root / file, {"annotations": row, "class_names": np.array([["a", "b"]], object)})

    return write


EVAL = "Eval/list_eval_partition.txt"
BAD_TREES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cub: missing list": ("cub200", lambda root: (root / "classes.txt").unlink(), r"classes\.txt is missing; unpack"),
    "cub: missing image": (
        "cub200",
        lambda root: (root / "images/001.Some_Bird_1/Some_Bird_1_0040_1.jpg").unlink(),
        r"1 of 36 images that \S*images\.txt lists are missing, first \S*Some_Bird_1_0040_1\.jpg; unpack",
    ),
    "cub: no images": ("cub200", lambda root: (root / "images").rename(root / "pictures"), r"36 of 36 images"),
    "cub: short row": (
        "cub200",
        _edit("images.txt", lambda text: text.replace("2 001.Some_Bird_1/Some_Bird_1_0041_2.jpg", "2", 1)),
        r"images\.txt, line 2: '2' has 1 field\(s\), not the 2 of `<image_id> <image_name>`",
    ),
    "cub: image without class": (
        "cub200",
        _edit("image_class_labels.txt", lambda text: text.replace("36 200\n", "")),
        r"images\.txt, line 36: image '36' has no class in",
    ),
    "cub: class without name": (
        "cub200",
        _edit("classes.txt", lambda text: text.replace("200 200.Some_Bird_200\n", "")),
        r"image_class_labels\.txt, line 33: class_id '200' is not in",
    ),
    "cub: two classes": (
        "cub200",
        _edit("image_class_labels.txt", lambda text: text + "1 7\n"),
        r"image_class_labels\.txt, line 37: image '1' has class 7 here and 1 before",
    ),
    "cub: no number": (
        "cub200",
        _edit("image_class_labels.txt", lambda text: text.replace("1 1\n", "1 one\n", 1)),
        r"image_class_labels\.txt, line 1: class_id is 'one', not a whole number",
    ),
    "cub: out of the archive": (
        "cub200",
        _edit("images.txt", lambda text: text.replace("1 001.Some_Bird_1/", "1 ../../", 1)),
        r"images\.txt, line 1: the path \S+ leads out of the archive",
    ),
    "cub: listed twice": (
        "cub200",
        _edit("images.txt", lambda text: text.replace("Some_Bird_1_0041_2", "Some_Bird_1_0040_1", 1)),
        r"lists images/001\.Some_Bird_1/Some_Bird_1_0040_1\.jpg again",
    ),
    "cub: no text": ("cub200", lambda root: (root / "images.txt").write_bytes(b"\xff\xfe"), r"images\.txt is not UTF-8"),
    "cars: missing list": ("cars196", lambda root: (root / "cars_annos.mat").unlink(), r"cars_annos\.mat cannot be read \(No such file"),
    "cars: missing image": (
        "cars196",
        lambda root: (root / "car_ims/000036.jpg").unlink(),
        r"1 of 36 images that \S*cars_annos\.mat lists are missing, first \S*car_ims/000036\.jpg; unpack",
    ),
    "cars: no images": ("cars196", lambda root: (root / "car_ims").rename(root / "pictures"), "has no images: it should hold car_ims/"),
    "cars: no table": (
        "cars196",
        lambda root: (root / "cars_annos.mat").write_text("<html>"),
        r"cars_annos\.mat cannot be used: .* level 5",
    ),
    "cars: no such class": (
        "cars196",
        _annotations("cars_annos.mat", relative_im_path="car_ims/000001.jpg", **{"class": 3}),
        r"cars_annos\.mat, annotation 1: class 3; there are 2 class_names",
    ),
    "cars: class as text": (
        "cars196",
        _annotations("cars_annos.mat", relative_im_path="car_ims/000001.jpg", **{"class": "3"}),
        r"cars_annos\.mat is damaged: annotations\.0\.class: Input should be a valid integer \(got '3'\)",
    ),
    "cars: without labels": (
        "cars196_devkit",
        lambda root: (root / "cars_test_annos_withlabels.mat").unlink(),
        r"cars_test_annos_withlabels\.mat is missing; the list without labels, cars_test_annos\.mat, does not do",
    ),
    "cars: the list without labels in its place": (
        "cars196_devkit",
        lambda root: (root / "devkit/cars_test_annos.mat").rename(root / "cars_test_annos_withlabels.mat"),
        r"cars_test_annos_withlabels\.mat is damaged: annotations\.0\.class: Field required",
    ),
    "cars: one folder is missing": (
        "cars196_devkit",
        lambda root: (root / "cars_test").rename(root / "test"),
        r"18 of 18 images that \S*withlabels\.mat lists are missing, first \S*cars_test/00001\.jpg",
    ),
    "sop: missing list": ("sop", lambda root: (root / "Ebay_test.txt").unlink(), r"Ebay_test\.txt is missing; unpack"),
    "sop: no header": (
        "sop",
        _edit("Ebay_train.txt", lambda text: text.split("\n", 1)[1]),
        r"Ebay_train\.txt, line 1: '1 1 2 \S*' where 'image_id class_id super_class_id path' should be",
    ),
    "sop: short row": (
        "sop",
        _edit("Ebay_train.txt", lambda text: text.replace("\n1 1 2 ", "\n1 1 ", 1)),
        r"Ebay_train\.txt, line 2: .* has 3 field\(s\), not the 4",
    ),
    "sop: missing folder": (
        "sop",
        lambda root: (root / "toaster_final").rename(root / "toasters"),
        r"8 of 24 images that \S*Ebay_train\.txt lists are missing, first \S*toaster_final/111085122873_0\.JPG; unpack",
    ),
    "sop: class in both": (
        "sop",
        _edit("Ebay_test.txt", lambda text: text.replace(" 11319 1 ", " 6 1 ", 1)),
        r"1 classes are to be trained on and tested, first 6;",
    ),
    "sop: two super-classes": (
        "sop",
        _edit("Ebay_train.txt", lambda text: text.replace("\n1 1 2 ", "\n1 1 3 ", 1)),
        r"Ebay_train\.txt, line 3: class 1 has super-class 2 here and 3 before",
    ),
    "inshop: cut off": (
        "inshop",
        _edit(EVAL, lambda text: "\r\n".join(text.split("\r\n")[:-3])),
        r"list_eval_partition\.txt has 34 rows, but its first line says 36; it is cut off",
    ),
    "inshop: no number of rows": (
        "inshop",
        _edit(EVAL, lambda text: text.split("\n", 1)[1]),
        r"list_eval_partition\.txt, line 1: 'image_name item_id evaluation_status' where the number of its rows should be",
    ),
    "inshop: another status": (
        "inshop",
        _edit(EVAL, lambda text: text.replace(" query ", " probe ", 1)),
        r"list_eval_partition\.txt, line 27: evaluation_status is 'probe'; allowed are train, query, gallery",
    ),
    "inshop: short row": (
        "inshop",
        _edit(EVAL, lambda text: text.replace(" id_00000001 ", " ", 1)),
        r"list_eval_partition\.txt, line 3: .* has 2 field\(s\), not the 3",
    ),
    "inshop: no images": ("inshop", lambda root: (root / "img").rename(root / "pictures"), r"holds neither img/ nor Img/img/"),
    "inshop: packed images": (
        "inshop",
        lambda root: ((root / "img").rename(root / "pictures"), (root / "img.zip").write_bytes(b"x")),
        r"holds neither img/ nor Img/img/.*; unpack \S*img\.zip",
    ),
    "inshop: another path": (
        "inshop",
        _edit(EVAL, lambda text: text.replace("img/MEN", "pic/MEN", 1)),
        r"list_eval_partition\.txt, line 3: the path \S+ does not begin with img/",
    ),
}


@pytest.mark.parametrize("name", list(BAD_TREES))
def test_a_bad_tree_gives_one_message(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout, spoil, message = BAD_TREES[name]
    reader, make = TREES[layout]
    root = make(tmp_path / "src")
    spoil(root)
    with pytest.raises(InputError, match=message):
        read(reader, root, counts="any")
    assert cli.run(["data", "prepare", reader, "--root", str(root), "--out", str(tmp_path / "out"), "--counts", "any"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1 and "Traceback" not in captured.err + captured.out
    assert not (tmp_path / "out").exists()
