"""``dnc-dist report``: one self-contained HTML file about a run."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Write a run's report, one self-contained HTML file.")
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write report.html into the run directory RUN, also while it is still training, and print where it is."""
    from dnc_dist.report import build_report

    click.echo(build_report(run))
