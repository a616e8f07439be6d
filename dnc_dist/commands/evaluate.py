"""``dnc-dist evaluate``: retrieval metrics of a trained run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dnc_dist.base.parts import TABLE


@click.command(short_help="Measure retrieval of a trained run.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--protocol", metavar="NAME", help=f"Retrieval protocol: {', '.join(TABLE['protocol'])}, module:Class.  [default: the run's]")
@click.option("--checkpoint", type=click.Choice(["best", "last"]), default="best", show_default=True, help="Which checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def evaluate(run: Path, protocol: str | None, checkpoint: str, as_json: bool) -> None:
    """Measure retrieval with the model of the run directory RUN.

    Below the metrics stands their card: the protocol, data, weights and code that they stand on.
    """
    from dnc_dist.engine.evaluate import evaluate_run

    metrics = evaluate_run(run, protocol=protocol, checkpoint=checkpoint)
    click.echo(json.dumps(metrics) if as_json else _table(metrics))


def _table(metrics: dict[str, Any]) -> str:
    """Metrics, then their card, a value a line."""
    card = metrics.pop("card")
    # What the card says stands there.
    shown = {name: value for name, value in metrics.items() if name not in card} | {f"card.{name}": value for name, value in card.items()}
    width = max(map(len, shown))
    return "\n".join(
        f"{name.ljust(width)}  {value:.4f}" if isinstance(value, float) else f"{name.ljust(width)}  {value}"
        for name, value in shown.items()
    )
