"""``dnc-dist embed``: the embeddings of many images in a file."""

from __future__ import annotations

import time
from pathlib import Path

import click

from dnc_dist.base.foreign import printable

_SHOWN = 10


@click.command(short_help="Write the embeddings of many images to a file.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="FILE.parquet, or FILE.npy with FILE.keys.json beside it.")
@click.option("--split", type=click.Choice(["train", "validation", "test"]), help="Of a prepared data set.  [default: all of it]")
@click.option("--checkpoint", default="best", show_default=True, metavar="best|last|NAME", help="Which checkpoint of the run.")
@click.option("--nproc", type=click.IntRange(min=1), help="Processes.  [default: one per GPU; without a GPU one per core, 8 at most]")
def embed(run: Path, data: Path, out: Path, split: str | None, checkpoint: str, nproc: int | None) -> None:
    """Write the embedding of every image of DATA with the model of RUN (a run directory, or an exported model).

    DATA is a folder of images at any depth, a data set that `data prepare` wrote, a .csv file with a column path (and maybe label or
    class), a text file with a path on each line, or an image. The file is the same for any number of processes. After an
    interruption the same command goes on. Images that cannot be read are listed and left out.
    """
    from dnc_dist.inference.embed import embed_to_file

    started = time.monotonic()
    written = embed_to_file(
        run, data, out, split=split, checkpoint=checkpoint, nproc=nproc, tell=lambda text: click.echo(printable(text), err=True)
    )
    if written.unreadable:
        total = written.rows + len(written.unreadable)
        click.echo(
            f"warning: {len(written.unreadable):,} of {total:,} images could not be read and are left out (all in the file):", err=True
        )
        for key, why in written.unreadable[:_SHOWN]:
            click.echo(printable(f"  {key}: {why}"), err=True)
        if len(written.unreadable) > _SHOWN:
            click.echo(f"  … and {len(written.unreadable) - _SHOWN:,} more", err=True)
    took = time.monotonic() - started
    click.echo(f"{written.rows:,} embedding(s) of {written.dim} dimensions written to {click.format_filename(out)} in {took:.1f} s")
