"""The benchmark of icons, on families of a few icons that the test makes: names, drawings, repeats, split, and the data set it writes."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.icons.classes import gather
from benchmarks.icons.drawing import Drawing, colours
from benchmarks.icons.families import drawings, families
from benchmarks.icons.names import bare, class_key, class_name, stem
from dnc_dist.base.errors import InputError
from dnc_dist.data.index import open_index, text

ROOT = Path(__file__).resolve().parent.parent
_SHAPES = ("bell", "kite", "flag", "stairs", "drop", "hill", "boat", "tent")


def _body(shape: str, family: str) -> str:
    """A polygon of its own for each shape of each family."""
    corners = np.frombuffer(hashlib.sha256(f"{shape} {family}".encode()).digest(), np.uint8)[:12] % 22 + 1
    return f'<path fill="currentColor" d="M{" L".join(f"{x} {y}" for x, y in corners.reshape(6, 2))}z"/>'


def _package(folder: Path, name: str, more: dict[str, dict[str, object]]) -> dict[str, str]:
    """A package of one family as the registry has it, and its line of the list."""
    icons = {f"{shape}-line": {"body": _body(shape, name)} for shape in _SHAPES}
    data = json.dumps({"prefix": name, "icons": icons | more, "width": 24, "height": 24}).encode()
    with tarfile.open(folder / f"iconify-json-{name}-1.0.0.tgz", "w:gz") as archive:
        entry = tarfile.TarInfo("package/icons.json")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    digest = hashlib.sha512((folder / f"iconify-json-{name}-1.0.0.tgz").read_bytes()).digest()
    integrity = f"sha512-{base64.b64encode(digest).decode()}"
    return {"name": name, "version": "1.0.0", "integrity": integrity, "licence": "MIT", "designer": "nobody", "styles": "line fill"}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four families with their list; besides the shapes, `ringer` repeats `bell`, and one family copies another's kite."""
    folder = tmp_path_factory.mktemp("packages")
    listed = []
    for name in ("ash", "birch", "cedar", "elm"):
        bell = _body("bell", name)
        more: dict[str, dict[str, object]] = {
            "ringer-line": {"body": bell},
            "bell-fill": {"body": '<circle cx="12" cy="12" r="9" fill="currentColor"/>', "hidden": True},
            "only-here": {"body": bell, "hidden": name != "ash"},
        }
        if name == "birch":
            more["kite-line"] = {"body": _body("kite", "ash")}
        listed.append(_package(folder, name, more))
    (folder / "families.json").write_text(json.dumps(listed))
    return folder


@pytest.mark.parametrize(
    ("name", "styles", "found"),
    [
        ("home-outline", "outline", ("home", False)),
        ("home-24-filled", "24 filled", ("home", False)),
        ("traffic-light", "fill line", ("traffic-light", False)),
        ("traffic-light", "light", ("traffic", False)),
        ("arrow--left", "", ("arrow-left", False)),
        ("home-2", "", ("home", True)),
        ("home-01", "", ("home", False)),
        ("home-variant-outline", "outline", ("home", True)),
        ("arrow-down-1-9", "", ("arrow-down", True)),
        ("dice-3", "", ("dice-3", False)),
        ("outline", "outline", ("outline", False)),
    ],
)
def test_styles_and_alternatives_are_no_part_of_a_name(name: str, styles: str, found: tuple[str, bool]) -> None:
    assert bare(name, styles.split()) == found


def test_one_thing_under_several_names_is_one_class() -> None:
    for names in (
        ("user-plus", "person-add", "account-plus", "plus-user"),
        ("arrow-left-circle", "arrow-circle-left", "circle-arrow-left"),
        ("magnifying-glass", "search", "magnify"),
        ("chevrons-left", "chevron-double-left"),
    ):
        assert len({class_key(name) for name in names}) == 1, names
    assert class_key("arrow-left") != class_key("arrow-right")
    assert class_name(["home", "house", "home", "house", "home-page"]) == "home"


def test_relatives_share_a_stem() -> None:
    assert {stem(name) for name in ("arrow-left", "arrow-left-circle", "circle-arrow-left")} == {"arrow"}
    assert {stem(name) for name in ("user", "person-add", "account-off")} == {"user"}
    assert stem("circle") == "circle"


def test_a_family_gives_one_drawing_and_a_plain_one_if_it_has_one() -> None:
    body, box = "<path/>", (0.0, 0.0, 24.0, 24.0)
    made = [Drawing(family, name, body, box) for family in "ab" for name in ("home-2-line", "home-line", "home-fill", "lone-4-line")]
    classes = gather(made, dict.fromkeys("ab", "line fill"), 2, 0)
    assert [entry.name for entry in classes] == ["home", "lone"]
    assert [drawing.family for drawing in classes[0].drawings] == ["a", "b"]
    assert all(drawing.name in ("home-line", "home-fill") for drawing in classes[0].drawings)
    assert gather(made, dict.fromkeys("ab", "line fill"), 3, 0) == []


def test_colours_differ_and_can_be_told_apart() -> None:
    pairs = [colours(0, "ash", f"icon{number}") for number in range(200)]
    assert len(set(pairs)) == 200 and pairs == [colours(0, "ash", f"icon{number}") for number in range(200)]
    lighter = [sum(bytes.fromhex(ground[1:])) > sum(bytes.fromhex(ink[1:])) for ink, ground in pairs]
    assert 0 < sum(lighter) < 200  # dark on light, and light on dark


def test_a_package_that_is_not_the_pinned_one_is_refused(packages: Path, tmp_path: Path) -> None:
    family = families(packages / "families.json")[0]
    assert "only-here" in {drawing.name for drawing in drawings(family, packages)}
    (tmp_path / family.file).write_bytes((packages / family.file).read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match="sha512 differs"):
        drawings(family, tmp_path)


def test_the_data_set(packages: Path, tmp_path: Path) -> None:
    """Shapes of four families become classes; what repeats another class or family does not."""
    command = [sys.executable, "-m", "benchmarks.icons", "--families", packages / "families.json", "--cache", packages, "--size", "32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    made = [subprocess.run([*command, "--out", tmp_path / out], env=environment, capture_output=True, text=True) for out in ("one", "two")]
    assert made[0].returncode == 0, made[0].stderr
    index = open_index(tmp_path / "one")
    # `ringer` shows what `bell` shows, and of the kites one is a copy, so that too few are left.
    assert index.class_names == ["bell", "boat", "drop", "flag", "hill", "stairs", "tent"]
    assert len(index) == 28 and set(np.bincount(index.columns["label"])) == {4}
    assert {text(value) for value in index.columns["family"]} == {"ash", "birch", "cedar", "elm"}
    splits = [set(index.columns["label"][index.view(split).rows]) for split in ("train", "test")]
    assert not splits[0] & splits[1] and all(len(labels) >= 2 for labels in splits)
    assert index.content_hash == open_index(tmp_path / "two").content_hash
    assert "MIT: ash 1.0.0 (nobody, 7)" in made[0].stdout and "1 classes that repeat another one" in made[0].stdout
