"""``dnc-dist search``: the images of an index that are nearest to given ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import printable

if TYPE_CHECKING:
    from dnc_dist.inference.search import Answer


@click.command(short_help="Find the images of an index that are nearest to given ones.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path(path_type=Path))
@click.option("--index", "index_file", type=click.Path(path_type=Path), required=True, help="An index that `dnc-dist index` built.")
@click.option("--top", type=click.IntRange(min=1, max=10_000), default=10, show_default=True, help="Hits for each query.")
@click.option("--checkpoint", default="best", show_default=True, metavar="best|last|NAME", help="Which checkpoint of the run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a hit instead of a table.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Also draw a contact sheet, a PNG: left the query, right its hits.")
def search(run: Path, images: tuple[Path, ...], index_file: Path, top: int, checkpoint: str, as_json: bool, sheet: Path | None) -> None:
    """Find what is nearest to each IMAGE, or to each image of a folder, with the model of RUN that the index was made with."""
    from dnc_dist.embedder import load
    from dnc_dist.inference.index import VectorIndex
    from dnc_dist.inference.search import search as find

    if sheet is not None and (sheet.suffix.lower() != ".png" or sheet.is_dir()):
        raise InputError(f"--sheet {sheet} is no name of a PNG file; give one that ends in .png")
    found = find(load(run, checkpoint=checkpoint), VectorIndex(index_file), images, top)
    for key, why in found.unreadable:
        click.echo(printable(f"warning: {key} could not be read and is left out: {why}"), err=True)
    for line in _lines(found.answers) if as_json else _table(found.answers):
        click.echo(line)
    if sheet is not None:
        _save(sheet, found.answers)


def _lines(answers: list[Answer]) -> list[str]:
    lines = []
    for answer in answers:
        for hit in answer.hits:
            values = {"query": answer.query, "rank": hit.rank, "key": hit.key, "path": hit.path, "class": hit.class_name}
            lines.append(json.dumps(values | {"similarity": hit.similarity}, ensure_ascii=False))
    return lines


def _table(answers: list[Answer]) -> list[str]:
    rows = [("query", "rank", "similarity", "class", "key")]
    for answer in answers:
        rows += [
            (answer.query, str(hit.rank), f"{hit.similarity:.4f}", printable(hit.class_name or ""), printable(hit.key))
            for hit in answer.hits
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join([*(value.ljust(width) for value, width in zip(row, widths, strict=False)), row[4]]).rstrip() for row in rows]


def _save(sheet: Path, answers: list[Answer]) -> None:
    from dnc_dist.base.files import replacing
    from dnc_dist.inference.sheet import MOST_HITS, MOST_QUERIES, contact_sheet

    sheet.parent.mkdir(parents=True, exist_ok=True)
    with replacing(sheet) as file:
        contact_sheet(answers).save(file, "png")
    cut = len(answers) > MOST_QUERIES or max(len(answer.hits) for answer in answers) > MOST_HITS
    what = f" (the first {MOST_QUERIES} queries, and {MOST_HITS} hits of each)" if cut else ""
    click.echo(f"contact sheet{what}: {click.format_filename(sheet)}", err=True)
