"""docs/using-the-model.md: its files, commands and snippets work as they stand there, from the first to the last."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.run_fixtures import dnc, without_report

PAGE = (Path(__file__).parent.parent / "docs" / "using-the-model.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def draw_photos(place: Path) -> None:
    """Eight classes of eight noisy patterns, ``photos/a/0.jpg`` and so on."""
    generator = np.random.default_rng(3)
    for name in "abcdefgh":
        (place / "photos" / name).mkdir(parents=True)
        pattern = generator.uniform(40, 215, (4, 6, 3)).repeat(10, 0).repeat(10, 1)
        for number in range(8):
            pixels = (pattern + generator.normal(0, 30, pattern.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / "photos" / name / f"{number}.jpg", quality=95)


@pytest.mark.slow
def test_the_walk_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    draw_photos(tmp_path)
    for language, text in BLOCKS:
        if language == "yaml":
            (tmp_path / text.split("\n", 1)[0].removeprefix("# ")).write_text(text)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    ran = []
    for language, text in BLOCKS:
        if language == "python":
            exec(text, names)
        for command in text.splitlines() if not language else []:
            words = shlex.split(command)
            assert words[0] == "dnc-dist"
            done = dnc(*words[1:], folder=tmp_path, before=without_report)
            assert done.code == 0, (command, done)
            ran.append(words[1])
            if words[1] == "search":
                # The query is in the index.
                assert "a/0.jpg" in done.out.splitlines()[0 if "--json" in words else 1]
    assert ran == ["data", "launch", "embed", "index", "search", "search", "export"]
    assert len(names["z"]) == 64 and (tmp_path / "hits.png").is_file() and (tmp_path / "shop-model" / "README.md").is_file()
