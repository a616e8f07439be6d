"""``dnc-dist config``: the resolved configuration, or the reference of all keys."""

from __future__ import annotations

from pathlib import Path

import click

from dnc_dist.commands.train import overrides_option


@click.command(short_help="Print the resolved configuration, or all keys.")
@click.argument("config", required=False, metavar="[CONFIG]")
@overrides_option
@click.option("--keys", is_flag=True, help="Print every key and every part with default and meaning.")
def config(config: str | None, overrides: tuple[str, ...], keys: bool) -> None:
    """Print CONFIG with all defaults and changes filled in, as YAML that can be used in its place.

    With --keys, print the reference of all keys and parts instead: of everything, of one word (a section, a key such as model.masks,
    a kind of part such as reader, a part such as margin or my_module:MyLoss), or with the parts of your own that a CONFIG file uses.
    """
    from dnc_dist.config import dump_config, load_config

    if keys:
        from dnc_dist.keys import describe_keys

        of_file = config is not None and Path(config).is_file()
        cfg = load_config(config, overrides) if config is not None and of_file else None
        click.echo(describe_keys("" if config is None or of_file else config, cfg))
    elif config is None:
        raise click.UsageError("give a CONFIG file, or --keys for the reference of all keys")
    else:
        click.echo(dump_config(load_config(Path(config), overrides)), nl=False)
