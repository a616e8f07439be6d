"""``dnc-dist index``: an index of embeddings for search."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Build an index of embeddings for search.")
@click.argument("embeddings", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The index; its keys go to FILE.keys.json beside it.")
@click.option(
    "--kind",
    type=click.Choice(["flat", "ivf", "hnsw"]),
    default="flat",
    show_default=True,
    help="flat compares with every image and misses none; ivf and hnsw are for millions, and may miss some.",
)
def index(embeddings: Path, out: Path, kind: str) -> None:
    """Build a FAISS index of EMBEDDINGS, a file that `embed` wrote."""
    from dnc_dist.base.errors import InputError
    from dnc_dist.inference import table
    from dnc_dist.inference.index import KINDS, build_index, keys_file

    sources = {path.resolve() for path in (embeddings, table.keys_file(embeddings))}
    if lost := {out.resolve(), keys_file(out).resolve()} & sources:
        raise InputError(f"--out {out} would replace {lost.pop().name}, which the embeddings are in; give another name")
    keys, vectors = table.read_table(embeddings)
    build_index(out, next(known for known in KINDS if known == kind), keys, vectors)
    click.echo(f"index ({kind}) of {len(keys):,} embedding(s) of {vectors.shape[1]} dimensions written to {click.format_filename(out)}")
