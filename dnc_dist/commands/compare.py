"""``dnc-dist compare``: runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command(short_help="Show runs side by side, seeds as mean and deviation.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def compare(runs: tuple[Path, ...], as_json: bool) -> None:
    """Show the results of run directories side by side.

    Runs that differ in their seed only are one group, shown as mean ± standard deviation. Every other group is compared with the
    first one, seed by seed. Numbers whose cards differ in more than seed, code and epoch are not compared: the command says in
    what they differ, and ends with exit code 2. Runs that are not finished are marked with a star.
    """
    from dnc_dist.rundir.comparison import compare_runs, table

    found = compare_runs(runs)
    click.echo(json.dumps(found.plain()) if as_json else table(found))
