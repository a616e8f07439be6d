"""``dnc-dist doctor data`` tells what preparing a data set found out about it."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image

from dnc_dist.config import load_config
from dnc_dist.data.manifest import STAGING
from dnc_dist.data.readers import read
from dnc_dist.data.shards import write_shards
from dnc_dist.doctor.data import check_data
from dnc_dist.doctor.table import Check, render
from tests.run_fixtures import draw_folder, write_config


def checks(place: Path) -> dict[str, Check]:
    section = check_data(load_config(write_config(place, place / "data"), []), decode_all=True)
    assert all(f"  {check.status}  {check.hint}" in render(section) for check in section.checks if check.status == "warning")
    return {check.name: check for check in section.checks}


def test_every_finding_has_its_row(tmp_path: Path) -> None:
    pictures = draw_folder(tmp_path / "pictures", {f"a{number}": 4 for number in range(12)}, {"b": 4})
    write_shards(read("folder", pictures), tmp_path / "data")
    found = checks(tmp_path)
    assert (found["duplicates"].value, found["duplicates"].status) == ("none", "ok")
    assert found["metadata"].status == "ok" and not {"left out", "skipped", "left behind"} & set(found)

    shutil.copy(pictures / "train/a0/0.png", pictures / "test/b/9.png")
    shutil.copy(pictures / "train/a0/1.png", pictures / "train/a0/9.png")
    (pictures / "train/a1/zero.png").write_bytes(b"")
    (pictures / "train/a1/phone.heic").write_bytes(b"x")
    write_shards(read("folder", pictures), tmp_path / "data", force=True)
    (tmp_path / "data" / STAGING).mkdir()
    found = checks(tmp_path)
    assert found["duplicates"].status == "warning"
    assert found["duplicates"].value == "2 groups of equal images (4 images), 1 groups lie in more than one split, 1 in more than one class"
    assert "train/a0/0.png = test/b/9.png" in found["duplicates"].hint and "all in duplicates.json" in found["duplicates"].hint
    assert found["left out"].value == "1 images" and "train/a1/zero.png: UnidentifiedImageError" in found["left out"].hint
    assert "1 .heic" in found["skipped"].value
    assert "interrupted" in found["left behind"].value


def test_metadata_of_an_earlier_version_is_found(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from dnc_dist.data import images

    pictures = draw_folder(tmp_path / "pictures", {f"a{number}": 4 for number in range(12)}, {"b": 4})
    exif = Image.Exif()
    exif[0x010E] = "where it was"
    for path in pictures.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"), exif=exif)
        path.unlink()
    monkeypatch.setattr(images, "without_metadata", lambda data: data)
    write_shards(read("folder", pictures), tmp_path / "data")
    row = checks(tmp_path)["metadata"]
    assert (row.value, row.status) == ("in 52 of the images that were read", "warning") and "--force" in row.hint
