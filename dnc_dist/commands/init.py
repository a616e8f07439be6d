"""``dnc-dist init``: a commented configuration for a prepared data set."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Write a commented configuration for a prepared data set.")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The file to write; it must not exist.  [default: NAME OF DATA.yaml, here]")
def init(data: Path, out: Path | None) -> None:
    """Look at the prepared data set DATA and write a configuration for it, with the reason for every value in a comment.

    Number and size of the images, classes and images per class decide it. A file that is there is never overwritten.
    """
    from dnc_dist.base.errors import InputError
    from dnc_dist.base.foreign import printable
    from dnc_dist.config import load_config
    from dnc_dist.data.index import open_index
    from dnc_dist.engine.proposal import as_yaml, facts_of, propose

    path = out or Path(f"{data.resolve().name}.yaml")
    taken = f"{path} is there already and is not overwritten; name another file with --out, or remove it"
    if path.exists():  # before the data is looked at
        raise InputError(taken)
    try:
        str(data).encode()
    except UnicodeEncodeError:
        raise InputError(f"{printable(str(data))}: a name that is no UTF-8 cannot stand in a configuration; rename the folder") from None
    facts = facts_of(open_index(data))
    content = as_yaml(data, facts, propose(data, facts)).encode()
    try:
        with path.open("xb") as file:
            try:
                file.write(content)
                file.flush()
            except OSError:
                path.unlink()  # or the next try would find it there
                raise
    except FileExistsError:
        raise InputError(taken) from None
    load_config(path)
    place = click.format_filename(f"./{path}" if str(path).startswith("-") else path)
    click.echo(f"written to {place}; look at it, then train with `dnc-dist launch {place}`")
