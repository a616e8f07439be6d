"""``dnc-dist train``: one worker of a training run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dnc_dist.base.errors import RunError, Stopped


def overrides_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The ``--set`` option, shared by all commands that read a configuration."""
    return click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key, for example --set optim.lr=0.001; repeatable."
    )(function)


def resume_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """The ``--resume`` option of launch and train."""
    return click.option(
        "--resume",
        default="auto",
        show_default=True,
        metavar="auto|never|PATH",
        help="Continue the run if it has checkpoints, never, or from a given checkpoint.",
    )(function)


@click.command(short_help="Run one worker; launch, torchrun and srun start it.")
@click.argument("config", type=click.Path(path_type=Path))
@overrides_option
@resume_option
def train(config: Path, overrides: tuple[str, ...], resume: str) -> int:
    """Run one worker of the training that CONFIG describes.

    Its rank comes from the environment that launch, torchrun or srun sets; without any it is the only worker. The last
    line on stdout is `RESULT {...}`.
    """
    from dnc_dist.processes.worker import run_worker

    return run_worker(lambda: _train(config, overrides, resume))


def _train(config: Path, overrides: tuple[str, ...], resume: str) -> None:
    from dnc_dist.config import load_config

    cfg = load_config(config, overrides)

    from dnc_dist.data.workers import start_server

    if cfg.data.workers != 0:
        # It imports what its workers need beside this process, which does the same now.
        start_server()

    from dnc_dist.engine.trainer import train as train_run
    from dnc_dist.processes import distributed, watchdog
    from dnc_dist.processes.worker import end_process

    distributed.init(cfg.engine.timeout)
    watchdog.start(cfg.engine.timeout, cfg.engine.stall_timeout, end_process)
    main, failures = distributed.is_main(), list[Exception]()

    def report() -> None:
        distributed.shutdown()  # the others do not wait for it
        if not main:
            return
        from dnc_dist.report import build_report

        try:
            sys.stdout.write(f"report: {build_report(cfg.run.path)}\n")
        except Exception as error:  # raised below: whatever it is, it must not cost the result of the training
            failures.append(error)

    try:
        result = train_run(cfg, resume, report)
    except Stopped:
        distributed.shutdown()
        raise
    if main:
        sys.stdout.write(f"RESULT {json.dumps(result)}\n")
        sys.stdout.flush()
    for error in failures:
        if isinstance(error, OSError):
            raise RunError(f"the report cannot be written: {error}; `dnc-dist report {cfg.run.path}` tries again") from error
        raise error
