"""docs/extending.md: its files and commands work as they stand there, and its table is that of the parts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dnc_dist.base import part_modules, parts
from dnc_dist.config import choices
from tests.run_fixtures import dnc, without_report

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
# The first line of a file is its name.
FILES = dict(text.removeprefix("# ").split("\n", 1) for language, text in BLOCKS if language)
COMMANDS = [shlex.split(line)[1:] for language, text in BLOCKS if not language for line in text.splitlines()]


def test_the_page_has_all_kinds_of_files() -> None:
    assert list(FILES) == ["my_loss.py", "my_reader.py", "my_protocol.py", "my_backbone.py", "my_run.yaml"]
    assert [command[0] for command in COMMANDS] == ["data", "train", "evaluate", "config"]


def test_its_table_is_that_of_the_parts() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == list(parts.TABLE) == list(parts.BASES)
    keys = {choice.kind: f"{path}.name" if choice.section else path for path, choice in choices().items()} | {"reader": "data prepare NAME"}
    for kind, key, bases, names in rows:
        assert key == f"`{keys[kind]}`"
        assert names.partition(";")[0].split(", ") == list(parts.TABLE[kind])
        for base in re.findall(r"`(.+?)`", bases):
            assert parts.is_kind(kind, part_modules.find(base))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("extending")
    for name, text in FILES.items():
        (place / name).write_text(text)
    return place


def test_the_files_and_commands_of_the_page_work(folder: Path) -> None:
    prepare, train, evaluate, keys = COMMANDS
    done = dnc(*prepare, folder=folder)
    assert done.code == 0 and "written to data/stripes" in done.out, done
    result = dnc(*train, folder=folder, before=without_report).result
    assert result["protocol"] == "my_protocol:FirstIsGallery" and result["epoch"] == 2
    # 6 classes to test on, of 6 images: chance is 1/6.
    assert result["recall@1"] > 1 / 6
    config = (folder / "runs/my_run/config.yaml").read_text()
    assert "name: my_loss:LogisticPairs\n" in config and "  scale: 4.0\n  threshold: 0.4\n" in config
    done = dnc(*evaluate, folder=folder)
    assert done.code == 0 and re.search(r"protocol +leave-one-out", done.out), done
    done = dnc(*keys, folder=folder)
    assert done.code == 0 and "my_loss:LogisticPairs: Logistic loss on the cosines of pairs" in done.out, done
    assert "  loss.threshold = 0.5\n      The cosine between positives and negatives." in done.out
