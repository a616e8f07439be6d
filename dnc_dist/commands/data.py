"""``dnc-dist data``: prepare a data set as shards with an index, and look at one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from dnc_dist.base import part_text
from dnc_dist.base.part_table import TABLE


@click.group()
def data() -> None:
    """Prepare data sets and look at them."""


def _options_of_readers(function: Callable[..., Any]) -> Callable[..., Any]:
    """A flag for each option of each reader; what it may be, the reader says."""
    helps: dict[str, dict[str, list[str]]] = {}  # option -> what is said of it -> readers
    for name, address in TABLE["reader"].items():
        for key, option in part_text.described(*address.split(":")).items():
            text = f"{option.meaning} [default: {'none' if option.default is None else option.default}]"
            helps.setdefault(key, {}).setdefault(text, []).append(name)
    for key, texts in reversed(helps.items()):
        told = " ".join(f"{', '.join(names)}: {text}" for text, names in texts.items())
        function = click.option(f"--{key.replace('_', '-')}", key, metavar="VALUE", help=told)(function)
    return function


class _Prepare(click.Command):
    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what each reader reads, in its own words."""
        with formatter.section("Readers (NAME); my_module:MyReader takes one of your own"):
            formatter.write_dl([(name, part_text.summary(*address.split(":"))) for name, address in TABLE["reader"].items()])


@data.command(cls=_Prepare)
@click.argument("name", metavar="NAME")
@click.option("--root", type=click.Path(path_type=Path), help="Source: the folder, or the CSV file (glyphs needs none).")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the prepared data set goes.")
@click.option("--seed", default=0, show_default=True, help="Order of the classes, and every random choice of the reader.")
@click.option("--max-side", type=click.IntRange(min=16), help="Shrink larger images to this longer side (default: keep every size).")
@click.option("--quality", type=click.IntRange(1, 95), default=95, show_default=True, help="Of JPEGs that are encoded anew.")
@click.option(
    "--subsampling",
    type=click.Choice(["4:4:4", "4:2:0"]),
    default="4:4:4",
    show_default=True,
    help="Of the colours of JPEGs that are encoded anew; 4:2:0 is smaller.",
)
@click.option("--processes", type=click.IntRange(min=1), help="How many convert images, with the same result.  [default: one per core]")
@click.option(
    "--shards",
    type=click.IntRange(1, 100_000),
    default=64,
    show_default=True,
    help="Least number of shards for each split. A shard holds about 256 MB at most. There are never more shards than classes.",
)
@_options_of_readers
@click.option("--set", "settings", multiple=True, metavar="OPTION=VALUE", help="An option of the reader; repeatable.")
@click.option("--force", is_flag=True, help="Replace the prepared data set that is there.")
def prepare(
    name: str,
    root: Path | None,
    out: Path,
    seed: int,
    max_side: int | None,
    quality: int,
    subsampling: Literal["4:4:4", "4:2:0"],
    processes: int | None,
    shards: int,
    settings: tuple[str, ...],
    force: bool,
    **flags: str | None,
) -> None:
    """Write shards, index and manifest of what the reader NAME finds.

    Images stay as they are, unless they are no upright RGB JPEG or larger than --max-side. After an interruption the same command goes on.
    """
    from dnc_dist.base.progress import Progress
    from dnc_dist.data.images import Form
    from dnc_dist.data.index import open_index
    from dnc_dist.data.readers import read
    from dnc_dist.data.shards import write_shards
    from dnc_dist.data.summary import describe
    from dnc_dist.processes.cores import usable_cores

    options: dict[str, str] = {key: value for key, value in flags.items() if value is not None}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise click.UsageError(f"--set {setting}: expected OPTION=VALUE, for example --set test_share=0.3")
        options[key.strip()] = value
    progress = Progress(True)
    started = time.monotonic()
    reading = read(name, root, seed=seed, progress=progress.counter("samples", "sample"), **options)
    for note in reading.notes:
        click.echo(f"{name}: {note}")
    written = write_shards(
        reading,
        out,
        seed=seed,
        form=Form(max_side, quality, subsampling),
        processes=processes or len(usable_cores()),
        shards=shards,
        force=force,
        progress=progress.counter("images", "img"),
        say=click.echo,
    )
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
