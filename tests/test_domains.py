"""Prepared data sets joined as domains of one."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.domains import main, read
from dnc_dist.base.errors import InputError
from dnc_dist.data.index import open_index
from dnc_dist.data.readers import Reading, Sample
from dnc_dist.data.segments import read_rows
from dnc_dist.data.shards import write_shards


def image(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 12), (value, value, value)).save(buffer, format="JPEG")
    return buffer.getvalue()


def prepare(root: Path, shade: int) -> Path:
    samples = [
        Sample(f"c{label}", split, f"{label}/{view}.jpg", data=image(shade + 10 * label + view), query=view > 0)
        for label, split in enumerate(("train", "train", "test"))
        for view in range(3)
    ]
    write_shards(Reading("test", samples, {}), root, seed=0)
    return root


def test_every_image_keeps_its_class_split_and_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    roots = [prepare(tmp_path / "one", 0), prepare(tmp_path / "two", 100)]
    monkeypatch.setattr("sys.argv", ["domains", *map(str, roots), "--out", str(tmp_path / "both")])
    main()
    assert "written to" in capsys.readouterr().out
    joined = open_index(tmp_path / "both")

    def facts(name: str, index_root: Path) -> set[tuple[str, int, bool, bytes]]:
        index = open_index(index_root)
        names = [f"{name}{index.class_names[label]}" for label in index.columns["label"]]
        roles = [index.columns[column].tolist() for column in ("split", "query")]
        return set(zip(names, *roles, read_rows(index, np.arange(len(index))), strict=True))

    assert facts("", joined.root) == facts("one/", roots[0]) | facts("two/", roots[1])
    assert set(joined.columns["domain"].tolist()) == {b"one", b"two"}


def test_what_cannot_be_joined_is_named(tmp_path: Path):
    one = prepare(tmp_path / "one", 0)
    for roots in ([one], [one, one]):
        with pytest.raises(InputError, match="two or more, in folders of different names"):
            read(roots)
    with pytest.raises(InputError, match="is missing"):
        read([one, tmp_path])
