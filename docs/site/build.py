"""Builds the documentation site: ``make docs``, or ``python docs/site/build.py [--out FOLDER]``.

The pages are the README, those of docs/, and a few from elsewhere in the repository; all can be read without the site, too. They are
copied to one folder, links between them are turned to their new places, and the reference of keys is added from the code. Sphinx makes
HTML of them. A link that leads nowhere, any other warning, and a page that would load something from elsewhere end the build.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from dnc_dist.keys import describe_keys

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# File in the repository -> page of the site. Every page of docs/ and of this folder comes on top, under its own name.
ELSEWHERE = {"slurm/README.md": "slurm", "kernels/README.md": "kernels", "CHANGELOG.md": "changes", "CONTRIBUTING.md": "contributing"}
_INDENT = " " * 6  # of the meaning of a key in the text of ``describe_keys``
_READER = "data prepare"  # with what the part of a reader begins there
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:)([^)#\s]*)(#[^)\s]*)?\)")
# What a browser fetches without being asked to: scripts, styles, fonts, pictures, frames. Links that a reader follows are no matter.
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|link)\b[^>]*?\s(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)"""
)


def pages() -> dict[str, str]:
    """Path of every page in the repository -> its name on the site."""
    own = {f"docs/{path.name}": path.stem for path in sorted((ROOT / "docs").glob("*.md"))}
    return own | ELSEWHERE | {"README.md": "index"}


def with_links_of_the_site(text: str, page: str) -> str:
    """The text of a page with links to other pages turned to their names on the site; links to other files become their names."""
    names = pages()

    def turned(link: re.Match[str]) -> str:
        picture, words, target, anchor = link[1], link[2], link[3], link[4] or ""
        if not target:
            return link[0]
        path = os.path.normpath(os.path.join(os.path.dirname(page), target))
        if path in names:
            return f"[{words}]({names[path]}.md{anchor})"
        if path.startswith("docs/"):
            return f"{picture}[{words}]({path.removeprefix('docs/')})"
        if not (ROOT / path).exists():
            raise SystemExit(f"error: {page} links to {target}, which does not exist")
        return words if words.startswith("`") else f"`{words}`"

    return _LINK.sub(turned, text)


def keys() -> str:
    """All keys and parts, from the text that ``dnc-dist config --keys`` prints."""
    lines, section = [], ""
    for block in describe_keys().split("\n\n"):
        head, *rest = block.splitlines()
        title, _, words = head.partition(": ")
        place = _READER if title.startswith(_READER) else title.partition(".")[0]
        if place != section:
            lines += ["", f"## {place}"]
            section = place
        lines += ["", *([f"### `{title}`", ""] if title != section else []), words]
        for line in rest:
            meaning = line.removeprefix(_INDENT)
            if meaning == line:
                lines += ["", f"`{line.strip()}`"]
            else:
                lines.append(f": {meaning}" if lines[-1].startswith("`") else f"  {meaning}")
    return "\n".join(lines) + "\n"


def assemble(source: Path) -> None:
    """Write all pages and pictures into one folder."""
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for path in sorted([*(ROOT / "docs").glob("*.png"), *(ROOT / "docs").glob("*.svg"), *HERE.glob("*.md")]):
        shutil.copy(path, source)
    for path, name in pages().items():
        text = (ROOT / path).read_text(encoding="utf-8")
        (source / f"{name}.md").write_text(with_links_of_the_site(text, path), encoding="utf-8")
    for name, more in (("index", (HERE / "contents.md").read_text(encoding="utf-8")), ("configuration", keys())):
        with (source / f"{name}.md").open("a", encoding="utf-8") as file:
            file.write(f"\n{more}")
    (source / "contents.md").unlink()


def fetched_from_elsewhere(site: Path) -> list[str]:
    """Every address that a page or style of the site would load by itself."""
    found = []
    for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        for match in _FETCHED.finditer(path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(site)}: {match[1] or match[2]}")
    return found


def main() -> None:
    """Build, check, and say where it is."""
    parser = argparse.ArgumentParser(description="Build the documentation site.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site", help="folder of the HTML pages")
    site = parser.parse_args().out.resolve()
    source = site.parent / f"{site.name}-source"
    assemble(source)
    shutil.rmtree(site, ignore_errors=True)
    sphinx = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "--fresh-env", "-c", str(HERE), "-b", "html"]
    if subprocess.run([*sphinx, str(source), str(site)], check=False).returncode:
        raise SystemExit("error: the site has warnings (see above)")
    if found := fetched_from_elsewhere(site):
        raise SystemExit("error: pages load from elsewhere:\n" + "\n".join(found))
    print(f"documentation: {site / 'index.html'}")


if __name__ == "__main__":
    main()
