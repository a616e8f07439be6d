"""``dnc-dist config``: the resolved configuration, or the reference of all keys."""

from __future__ import annotations

from pathlib import Path

import click

from dnc_dist.commands.train import overrides_option


@click.command(short_help="Print the resolved configuration, or all keys.")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@overrides_option
@click.option("--keys", is_flag=True, help="Print every key with its default and meaning; needs no CONFIG.")
def config(config: Path | None, overrides: tuple[str, ...], keys: bool) -> None:
    """Print CONFIG with all defaults and changes filled in, as YAML that can be used in its place."""
    from dnc_dist.config import describe_keys, dump_config, load_config

    if keys:
        click.echo(describe_keys())
    elif config is None:
        raise click.UsageError("give a CONFIG file, or --keys for the reference of all keys")
    else:
        click.echo(dump_config(load_config(config, overrides)), nl=False)
