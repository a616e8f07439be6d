"""``dnc-dist evaluate``: retrieval metrics of a trained run."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dnc_dist.base.parts import TABLE


@click.command(short_help="Measure retrieval of a trained run.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--protocol", metavar="NAME", help=f"Retrieval protocol: {', '.join(TABLE['protocol'])}, module:Class.  [default: the run's]")
@click.option("--checkpoint", type=click.Choice(["best", "last"]), default="best", show_default=True, help="Which checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def evaluate(run: Path, protocol: str | None, checkpoint: str, as_json: bool) -> None:
    """Measure retrieval with the model of the run directory RUN."""
    from dnc_dist.engine.evaluate import evaluate_run

    metrics = evaluate_run(run, protocol=protocol, checkpoint=checkpoint)
    if as_json:
        click.echo(json.dumps(metrics))
        return
    width = max((len(name) for name in metrics), default=0)
    for name, value in metrics.items():
        click.echo(f"{name.ljust(width)}  {value:.4f}" if isinstance(value, float) else f"{name.ljust(width)}  {value}")
