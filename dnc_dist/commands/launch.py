"""``dnc-dist launch``: check the configuration, then start one worker per GPU and watch them."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dnc_dist.commands.train import overrides_option, resume_option


@click.command(short_help="Train on this machine, one worker per GPU.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--nproc", type=click.IntRange(min=1), help="Workers on this machine.  [default: number of GPUs, or 1]")
@click.option("--nnodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines; start the same command on each.")
@click.option("--rdzv", metavar="HOST:PORT", help="Where the machines meet: one of them and a free port.")
@overrides_option
@resume_option
def launch(config: Path, nproc: int | None, nnodes: int, rdzv: str | None, overrides: tuple[str, ...], resume: str) -> int:
    """Train what CONFIG describes.

    Rank 0's output is shown; if a worker fails, the first error of any rank is shown once. SIGTERM, SIGINT, SIGUSR1 and
    SIGUSR2 make the workers save and stop (exit code 75); `--resume auto` continues.
    """
    from dnc_dist.config import load_config

    if nnodes > 1 and not rdzv:
        raise click.UsageError(f"--nnodes {nnodes} needs --rdzv HOST:PORT, one of the machines and a free port, the same on all of them")
    load_config(config, overrides)

    from dnc_dist.launch import default_nproc, launch_workers

    command = [sys.executable, "-m", "dnc_dist", "train", str(config), "--resume", resume]
    command += [part for override in overrides for part in ("--set", override)]
    return launch_workers(command, nproc or default_nproc(), nnodes=nnodes, rendezvous=rdzv)
