"""The pages of the documentation, their blocks and commands, and what is wrong with them.

A fenced block has one of these languages. ``sh``: commands that are run. ``python``: run. ``yaml``: a configuration, a file if its first
line is a comment with a name. ``text``: what something prints. A block that cannot be run here has a line ``<!-- not run: REASON -->``
before it; a page none of whose blocks can be run stands in ``NOT_RUN``. What is not run is checked all the same.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import yaml

from dnc_dist.cli import COMMANDS, cli
from dnc_dist.config import ConfigError, RunConfig, parse_tree
from dnc_dist.keys import describe_keys

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "slurm/README.md", "kernels/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
# Page -> why none of its blocks is run by test_documentation.py.
NOT_RUN = {
    "docs/benchmarks.md": "needs archives that are not at hand",
    "docs/datasets.md": "needs archives that are not at hand; test_data_benchmarks.py reads small ones of their layout",
    "docs/divider.md": "test_divider.py runs it",
    "docs/extending.md": "test_extending.py runs it",
    "docs/results.md": "hours of training",
    "docs/tracking.md": "needs W&B's server; test_trackers.py runs its tracker",
    "docs/weights.md": "needs a network, and weights",
    "kernels/README.md": "signatures, and measurements on a GPU",
    "slurm/README.md": "needs a SLURM cluster; test_slurm.py starts one",
}
LANGUAGES = ("sh", "python", "yaml", "text")
_BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\S*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"(?<!\\)\[[^\]]*\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
_KEY = re.compile(rf"(?<![\w./-])(?:{'|'.join(RunConfig.model_fields)})\.[a-z_]+(?:\.[a-z_]+)*(?![\w(/.-])")
_FILE = re.compile(r"(?<![\w./-])(?:docs|configs|tests|benchmarks|slurm|kernels|dnc_dist)/[\w./-]+\.(?:py|yaml|md|sh|jsonl|png)\b")
_MODULE = re.compile(r"python -m ((?:benchmarks|tests)\.\w+)")
# What looks like a key and is something else: files, and attributes of a model in Python.
_NO_KEYS = {"model.safetensors", "model.onnx", "model.num_learners"}
# An option of the loss that docs/extending.md writes, and files that a reader makes.
_YOURS = {"loss.threshold", "tests/test_x.py", "slurm/site.sh"}
_FOREIGN_PART = re.compile(r"\b\w+:[A-Z]\w*")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, what it is, and why it is not run (empty: it is)."""

    line: int
    language: str
    text: str
    reason: str

    @property
    def file(self) -> str:
        """The name in the first line of a configuration that is a file."""
        found = re.match(r"# ([\w-]+\.yaml)\n", self.text)
        return found[1] if found and self.language == "yaml" else ""


def read(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, whole: str = "") -> list[Block]:
    """The fenced blocks of a page; ``whole``: why none of them is run."""
    return [Block(text.count("\n", 0, at.start("text")), at["language"], at["text"], at["reason"] or whole) for at in _BLOCK.finditer(text)]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command of a block: lines that end in a backslash go on, comments are left out."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words: list[str] = []
        for word in shlex.split(line, comments=True):
            if word in ("&&", "|", ";", "do", "done"):
                yield words
                words = []
            else:
                words.append(word.removesuffix(";"))
        yield words


def problems(text: str, *, keys: bool = True) -> list[str]:
    """What a page says that is not so: commands, options, keys, configurations and files that do not exist.

    Args:
        keys: also look at keys; not in the list of changes, which names old ones.
    """
    found = []
    for block in blocks(text):
        if block.language not in (*LANGUAGES, ""):
            found.append(f"line {block.line}: a block is {', '.join(LANGUAGES)}, not {block.language}")
        if block.language in ("sh", ""):
            for words in commands(block.text) if block.language else _shown(block.text):
                found += [f"line {block.line}: {problem}" for problem in _wrong_command(words)]
        if block.language == "yaml" and keys and not _FOREIGN_PART.search(block.text):
            found += [f"line {block.line}: {problem}" for problem in _wrong_yaml(block.text)]
    for code in _CODE.findall(_BLOCK.sub("", text)):
        if code.split()[0] == "dnc-dist" or (code.split()[0] in COMMANDS and " " in code):
            found += _wrong_command(code.replace(",", " ").split(), told=True)
        if keys:
            found += [f"{key} is no key" for key in _KEY.findall(code) if key not in known_keys() and key not in _NO_KEYS]
    for name in _FILE.findall(text):
        if name not in _YOURS and not (ROOT / name).exists():
            found.append(f"{name} does not exist")
    for name in _MODULE.findall(text):
        module = ROOT / name.replace(".", "/")
        if not module.with_suffix(".py").is_file() and not (module / "__main__.py").is_file():
            found.append(f"{name} does not exist")
    return found


def broken_links(page: str, text: str) -> list[str]:
    """Relative links and pictures of a page that lead nowhere, with their anchors."""
    found = []
    for target, anchor in _LINK.findall(_BLOCK.sub("", text)):
        path = (ROOT / page).parent / target if target else ROOT / page
        if not path.exists():
            found.append(f"{target} does not exist")
        elif anchor and anchor not in _anchors(path):
            found.append(f"{target}#{anchor}: there is no such heading")
    return found


@cache
def known_keys() -> frozenset[str]:
    """Every key of a configuration, also the options of parts and the keys that choose these."""
    return frozenset(re.findall(r"^ {0,2}([a-z_]+(?:\.[a-z_]+)+) = ", describe_keys(), re.MULTILINE))


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _shown(text: str) -> Iterator[list[str]]:
    """The commands among the lines of a block that may also show output."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if re.match(r"(?:for \w+ in .*; do )?dnc-dist |\. |cp |sbatch |srun |python ", line):
            yield from commands(line)


def _wrong_command(words: list[str], *, told: bool = False) -> Iterator[str]:
    """What does not exist of one call of dnc-dist: the command, or an option; nothing of other programs."""
    if "dnc-dist" in words:
        words = words[words.index("dnc-dist") + 1 :]
    elif not told:
        return
    command: Any = cli
    context = click.Context(cli)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, *words = words
        if name.isupper():  # `dnc-dist COMMAND --help`
            return
        if command.get_command(context, name) is None:
            yield f"dnc-dist {name}: there is no such command"
            return
        command = command.get_command(context, name)
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help", "-h"}
    for at, word in enumerate(words):
        flag = word.strip("[]").partition("=")[0]
        if flag.startswith("--") and flag not in options:
            yield f"dnc-dist {command.name} has no {flag}"
        if flag == "--set" and command.name != "prepare":
            key = " ".join(words[at + 1 :]).partition("=")[0]
            if key != "key" and key.strip("[]") not in known_keys() | _YOURS:
                yield f"--set {key}: there is no such key"


def _wrong_yaml(text: str) -> Iterator[str]:
    tree = yaml.safe_load(text)
    tree.setdefault("data", {}).setdefault("root", "data/mine")
    try:
        parse_tree(tree, "the block")
    except ConfigError as error:
        yield str(error)
