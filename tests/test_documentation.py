"""README and docs: what they name exists, and what they show runs, as it stands there."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dnc_dist.config import RunConfig, choices
from tests.documentation import LANGUAGES, NOT_RUN, PAGES, ROOT, blocks, broken_links, commands, known_keys, problems, read
from tests.run_fixtures import dnc, without_report, write_config

RUN = [
    page
    for page in PAGES
    if any(block.language in ("sh", "python") and not block.reason for block in blocks(read(page), NOT_RUN.get(page, "")))
]
# What the commands of a page get on top, so that they take seconds: a few epochs instead of those of the page.
QUICKER = {"launch": ["--set=schedule.epochs=4", "--set=evaluation.every=4", "--set=data.workers=0", "--set=tracker.kind=jsonl"]}

WRONG = """
`dnc-dist lunch`, `dnc-dist launch --dry-ran`, `optim.learning_rate`, `tests/test_nothing.py`, `dnc-dist launch CONFIG --set optim.lr=1`

```sh
dnc-dist embed runs/mine photos --output photos.parquet   # a comment
dnc-dist launch my.yaml --set \\
  schedule.epoch=3 && python -m benchmarks.nothing
```

```yaml
schedule: {epoch: 3}
```
"""


def test_what_is_wrong_on_a_page_is_found() -> None:
    found = problems(WRONG)
    told = ["dnc-dist lunch: there is", "launch has no --dry-ran", "optim.learning_rate is no key", "tests/test_nothing.py does not exist"]
    told += ["embed has no --output", "--set schedule.epoch: there is no such key", "benchmarks.nothing does not exist", "schedule.epoch"]
    assert len(found) == len(told) and all(any(words in problem for problem in found) for words in told), found
    assert broken_links("docs/scale.md", "[a](nothing.md) [b](security.md#no-heading) [c](security.md#trusted)") == [
        "nothing.md does not exist",
        "security.md#no-heading: there is no such heading",
    ]


@pytest.mark.parametrize("page", PAGES)
def test_commands_keys_files_and_links_of_the_page_exist(page: str) -> None:
    text = read(page)
    assert problems(text, keys=page != "CHANGELOG.md") == []
    assert broken_links(page, text) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in NOT_RUN])
def test_every_block_says_what_it_is(page: str) -> None:
    """A block without a language is neither run nor said not to be."""
    assert [block.line for block in blocks(read(page)) if block.language not in LANGUAGES] == []


def test_pages_that_are_not_run_exist() -> None:
    assert set(NOT_RUN) <= set(PAGES)


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """docs/site/build.py, which `make docs` starts; it imports Sphinx only when it builds."""
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "site" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_lead_to_pages_of_the_site(build: ModuleType) -> None:
    text = "[a](../slurm/README.md) [b](security.md#trusted) [c](../configs/) ![d](report_dark.png) [e](https://x.org/y.md) [f](#here)"
    turned = "[a](slurm.md) [b](security.md#trusted) `c` ![d](report_dark.png) [e](https://x.org/y.md) [f](#here)"
    assert build.with_links_of_the_site(text, "docs/scale.md") == turned
    assert build.with_links_of_the_site("[a](docs/scale.md)", "README.md") == "[a](scale.md)"
    with pytest.raises(SystemExit, match=r"docs/scale.md links to ../nothing.py, which does not exist"):
        build.with_links_of_the_site("[a](../nothing.py)", "docs/scale.md")


def test_every_page_has_its_place_on_the_site(build: ModuleType) -> None:
    """A new page is one line in docs/site/contents.md."""
    contents = re.findall(r"^[^:\n]+ <(\S+)>$", (ROOT / "docs/site/contents.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(contents) == sorted(({*build.pages().values()} | {"configuration", "commands", "api"}) - {"index"})


def test_every_key_has_its_place_on_the_site(build: ModuleType) -> None:
    lines = build.keys().splitlines()
    assert [line.removeprefix("## ") for line in lines if line.startswith("## ")] == [*RunConfig.model_fields, "data prepare"]
    chosen_by_name = {f"{path}.name" for path in choices()}  # which the headings of parts say
    assert {line.strip("`").split(" = ")[0] for line in lines if line.startswith("`")} >= known_keys() - chosen_by_name


def test_a_site_that_loads_from_elsewhere_is_found(build: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "good.html").write_text('<a href="https://x.org">x</a><script src="_static/a.js"></script><img src="a.png">')
    assert build.fetched_from_elsewhere(tmp_path) == []
    (tmp_path / "bad.html").write_text('<script defer src="https://x.org/a.js"></script><link rel="preconnect" href="//fonts.org">')
    (tmp_path / "bad.css").write_text('@import "https://x.org/a.css"; a { background: url(http://y.org/b.png) }')
    addresses = ["https://x.org/a.js", "//fonts.org", "https://x.org/a.css", "http://y.org/b.png"]
    assert sorted(found.split(": ")[1] for found in build.fetched_from_elsewhere(tmp_path)) == sorted(addresses)


def draw_photos(place: Path) -> None:
    """Eight classes of eight noisy patterns, ``photos/a/0.jpg`` and so on."""
    generator = np.random.default_rng(3)
    for name in "abcdefgh":
        (place / "photos" / name).mkdir(parents=True)
        pattern = generator.uniform(40, 215, (4, 6, 3)).repeat(10, 0).repeat(10, 1)
        for number in range(8):
            pixels = (pattern + generator.normal(0, 30, pattern.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / "photos" / name / f"{number}.jpg", quality=95)


def train_mine(place: Path) -> None:
    """``runs/mine``, trained on ``data/mine``, as on the README."""
    draw_photos(place)
    run_command(shlex.split("dnc-dist data prepare folder --root photos --out data/mine"), place)
    write_config(place, Path("data/mine"), "mine", division={"num_learners": 1, "conquer_from": None})
    run_command(shlex.split("dnc-dist launch mine.yaml --nproc 1"), place)


# Page -> what has to be there before its first command. The tutorial begins with nothing.
BEFORE = {"README.md": draw_photos, "docs/using-the-model.md": draw_photos, "docs/metrics.md": train_mine}


def run_command(words: list[str], place: Path) -> None:
    """Run a command of a page, and look whether what it was to write is there."""
    assert words[0] == "dnc-dist", f"only dnc-dist is run here, not {words}; say why not by <!-- not run: REASON -->"
    extra = QUICKER.get(words[1], []) if "--dry-run" not in words else []
    # The report is drawn once, by the command of that name.
    done = dnc(*words[1:], *extra, folder=place, timeout=1200, before=without_report if words[1] == "launch" else None)
    assert done.code == 0, (words, done)
    for option, value in itertools.pairwise(words):
        if option in ("--out", "--sheet", "--per-query"):
            assert (place / value).exists(), words
    if words[1] == "search":
        # The query is in the index, so it is its own first hit.
        query = place / words[3]
        first = query if query.is_file() else sorted(query.iterdir())[0]
        lines = done.out.splitlines()
        key = json.loads(lines[0])["key"] if "--json" in words else lines[1].split()[-1]
        assert key == f"{first.parent.name}/{first.name}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", RUN)
def test_what_the_page_shows_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files, commands and snippets, from the first to the last, in one folder."""
    BEFORE.get(page, lambda place: None)(tmp_path)
    monkeypatch.chdir(tmp_path)
    shown = [block for block in blocks(read(page)) if not block.reason]
    for block in shown:
        if block.file:
            (tmp_path / block.file).write_text(block.text)
    names: dict[str, Any] = {}
    for block in shown:
        if block.language == "python":
            exec(compile(block.text, f"{page}:{block.line}", "exec"), names)
        if block.language == "sh":
            for words in commands(block.text):
                if words:
                    run_command(words, tmp_path)
