"""``dnc-dist evaluate``: retrieval metrics of a trained run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from dnc_dist.base.part_table import TABLE


@click.command(short_help="Measure retrieval of a trained run.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data", required=False, type=click.Path(path_type=Path))
@click.option("--protocol", metavar="NAME", help=f"Retrieval protocol: {', '.join(TABLE['protocol'])}, module:Class.  [default: the run's]")
@click.option("--checkpoint", type=click.Choice(["best", "last"]), default="best", show_default=True, help="Which checkpoint.")
@click.option("--per-query", metavar="FILE.csv", type=click.Path(path_type=Path), help="Write what every single query found.")
@click.option(
    "--nproc", type=click.IntRange(min=1), help="Processes on this machine, each with its own GPU if there are any.  [default: 1]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def evaluate(
    run: Path, data: Path | None, protocol: str | None, checkpoint: str, per_query: Path | None, nproc: int | None, as_json: bool
) -> int:
    """Measure retrieval with the model of the run directory RUN, on its own test split or on that of another prepared data set DATA.

    Below the metrics stands their card: the protocol, data, weights and code that they stand on.

    --per-query writes a line for every query: key, source and class of the image, rank of the first hit, average precision, and the nearest
    image with its class and similarity (cosine).

    The digits do not depend on --nproc. Started by srun or torchrun, the command is one of their processes.
    """

    from dnc_dist.processes.worker import is_worker, run_worker

    def work() -> None:
        _work(run, data, protocol, checkpoint, per_query, as_json)

    if is_worker():
        if nproc:
            raise click.UsageError("--nproc starts processes, but srun or torchrun has already started this one; leave it out")
        return run_worker(work)
    if nproc is None:
        work()
        return 0
    # Before torch is imported: its store warns about every address that no name belongs to.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from dnc_dist.processes.launch import launch_workers, workers_here

    command = [sys.executable, "-m", "dnc_dist", "evaluate", "--checkpoint", checkpoint]
    command += [*(["--protocol", protocol] if protocol else []), *(["--per-query", str(per_query)] if per_query else [])]
    command += [*(["--json"] if as_json else []), "--", str(run), *([str(data)] if data else [])]
    return launch_workers(command, workers_here(nproc))


def _work(run: Path, data: Path | None, protocol: str | None, checkpoint: str, per_query: Path | None, as_json: bool) -> None:
    from dnc_dist.engine.evaluate import evaluate_run
    from dnc_dist.processes import distributed, watchdog
    from dnc_dist.processes.worker import end_process, is_worker

    if is_worker():
        from dnc_dist.rundir.folder import load_run_config

        engine = load_run_config(run).engine
        distributed.init(engine.timeout)
        watchdog.start(engine.timeout, engine.stall_timeout, end_process)
    metrics = evaluate_run(run, data, protocol=protocol, checkpoint=checkpoint, per_query=per_query)
    main = distributed.is_main()
    if is_worker():
        watchdog.stop()
        distributed.shutdown()
    if main:
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
