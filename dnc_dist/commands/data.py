"""``dnc-dist data``: prepare a data set as shards with an index, and look at one."""

from __future__ import annotations

import time
from pathlib import Path

import click


@click.group()
def data() -> None:
    """Prepare data sets and look at them."""


@data.command()
@click.argument("name", metavar="glyphs|folder|csv|vehicleid", type=click.Choice(["glyphs", "folder", "csv", "vehicleid"]))
@click.option("--root", type=click.Path(path_type=Path), help="Source: the folder, or the CSV file (glyphs needs none).")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the prepared data set goes.")
@click.option("--seed", default=0, show_default=True, help="Order of the classes, and every random choice of the reader.")
@click.option("--max-side", type=click.IntRange(min=16), help="Shrink larger images to this longer side (default: keep every size).")
@click.option(
    "--test-share",
    default=0.5,
    show_default=True,
    type=click.FloatRange(0, 0.9),
    help="folder: share of test classes, if not in split folders.",
)
@click.option("--images", type=click.Path(path_type=Path), help="csv: where relative paths begin (default: the folder of the CSV).")
@click.option("--fonts", type=click.Path(path_type=Path), help="glyphs: a folder of further .ttf and .otf typefaces.")
@click.option("--classes", type=click.IntRange(min=4), help="glyphs: at most this many characters.")
@click.option("--image-size", default=64, show_default=True, type=click.IntRange(16, 512), help="glyphs: side of the images.")
@click.option("--force", is_flag=True, help="Replace the prepared data set that is there.")
def prepare(
    name: str,
    root: Path | None,
    out: Path,
    seed: int,
    max_side: int | None,
    test_share: float,
    images: Path | None,
    fonts: Path | None,
    classes: int | None,
    image_size: int,
    force: bool,
) -> None:
    """Write shards, index and manifest.

    \b
    glyphs     characters drawn with the typefaces that matplotlib ships; no download
    folder     split/class/*.jpg, or class/*.jpg with --test-share of the classes as test split
    csv        columns path, label, split (an open-metric-learning table as it is)
    vehicleid  the archive's own layout: image/*.jpg and train_test_split/*.txt
    """
    from dnc_dist.base.errors import InputError
    from dnc_dist.base.progress import Progress
    from dnc_dist.data.index import open_index
    from dnc_dist.data.readers import csv, folder, glyphs, vehicleid
    from dnc_dist.data.shards import write_shards
    from dnc_dist.data.summary import describe

    progress = Progress(True)
    started = time.monotonic()
    if name == "glyphs":
        reading = glyphs.read(
            fonts=fonts, classes=classes, image_size=image_size, seed=seed, progress=progress.counter("characters", "char")
        )
    elif root is None:
        what = {"csv": "CSV file", "vehicleid": "folder with image/ and train_test_split/"}.get(name, "folder of images")
        raise InputError(f"data prepare {name} needs --root, the {what}")
    elif name == "folder":
        reading = folder.read(root, test_share=test_share, seed=seed)
    elif name == "vehicleid":
        reading = vehicleid.read(root)
    else:
        reading = csv.read(root, images=images)
    for note in reading.notes:
        click.echo(f"{name}: {note}")
    written = write_shards(reading, out, seed=seed, max_side=max_side, force=force, progress=progress.counter("images", "img"))
    click.echo(describe(open_index(out)))
    took = time.monotonic() - started
    place = click.format_filename(out)
    click.echo(f"written to {place} in {took:.1f} s" if written else f"{place} already holds this very data set; nothing to do")


@data.command()
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Where the contact sheet goes (default: DST/contact_sheet.png).")
@click.option("--seed", default=0, show_default=True, help="Which classes and images the contact sheet shows.")
def inspect(dst: Path, out: Path | None, seed: int) -> None:
    """Print counts of a prepared data set and draw a contact sheet: a class a row, every split."""
    from dnc_dist.base.errors import InputError
    from dnc_dist.data.index import open_index
    from dnc_dist.data.manifest import CONTACT_SHEET
    from dnc_dist.data.summary import contact_sheet, describe

    index = open_index(dst)
    click.echo(describe(index))
    path = out or dst / CONTACT_SHEET
    sheet = contact_sheet(index, seed=seed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, "png")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); name another place with --out") from error
    click.echo(f"contact sheet: {click.format_filename(path)}")
