"""``dnc-dist launch``: check the configuration, then start one worker per GPU, here or on several machines, and watch them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dnc_dist.base.settings import dotted
from dnc_dist.commands.train import overrides_option, resume_option

if TYPE_CHECKING:
    from dnc_dist.config import RunConfig


@click.command(short_help="Train on one machine or several, one worker per GPU.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--nproc", type=click.IntRange(min=1), help="Workers on each machine.  [default: number of GPUs; without a GPU 2]")
@click.option("--nnodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines; start the same command on each.")
@click.option("--rdzv", metavar="HOST:PORT", default="", help="Where the machines meet: an address of one of them and a free port.")
@click.option("--wait", type=click.FloatRange(min=1), default=600, show_default=True, help="Seconds to wait for the other machines.")
@click.option("--repeat", type=click.IntRange(min=1), default=1, help="Train so many times, each with the next seed, and compare the runs.")
@click.option("--dry-run", is_flag=True, help="Say what would be done and what it costs here, and do nothing else.")
@overrides_option
@resume_option
def launch(
    config: Path,
    nproc: int | None,
    nnodes: int,
    rdzv: str,
    wait: float,
    repeat: int,
    dry_run: bool,
    overrides: tuple[str, ...],
    resume: str,
) -> int:
    """Train what CONFIG describes.

    Rank 0's output is shown, on the machine that --rdzv names. If a worker fails, every machine prints the first error, and all
    workers stop. SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 make the workers of all machines save and stop (exit code
    75); `--resume auto` continues.

    --dry-run reads data and weights as the run would, measures a few steps and a piece of a pass in one process with its share of
    the batch, and prints the epochs, the sizes and the time that follow.

    --repeat 3 trains with run.seed, run.seed + 1 and run.seed + 2, one run after the other, in run directories NAME-seed0 to
    NAME-seed2; the same command goes on after a stop. At the end stands what `dnc-dist compare` says of them.

    Several machines prove to each other that they know one secret. The one that --rdzv names writes it, anew for each launch, to a
    file beside the run directory (run.dir/.NAME.launch-secret, readable for you alone), where the others find it. Where they share
    no such folder, set DNC_LAUNCH_SECRET to the same random text on all of them.
    """
    from dnc_dist.config import load_config

    if nnodes > 1 and not rdzv:
        raise click.UsageError(f"--nnodes {nnodes} needs --rdzv HOST:PORT, one of the machines and a free port, the same on all of them")
    cfg = load_config(config, overrides)

    # Before torch is imported: its store warns about every address that no name belongs to.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from dnc_dist.processes.launch import workers_here

    workers = workers_here(nproc)
    if dry_run:
        return _dry_run(cfg, nnodes * workers)
    meeting = {"nnodes": nnodes, "rendezvous": rdzv, "wait": wait}
    if repeat == 1:
        return _launch(config, cfg, overrides, resume, workers, meeting)
    runs = []
    for seed in range(cfg.run.seed, cfg.run.seed + repeat):
        of_seed = (*overrides, f"run.seed={seed}", f"run.name={cfg.run.name}-seed{seed}")
        repeated = load_config(config, of_seed)
        runs.append(repeated.run.path)
        click.echo(f"run {len(runs)} of {repeat}: {repeated.run.path}", err=True)
        if code := _launch(config, repeated, of_seed, resume, workers, meeting):
            return code
    if nnodes == 1:  # where several machines share no folder, only one of them has the runs
        from dnc_dist.rundir.comparison import compare_runs, table

        click.echo(table(compare_runs(runs)))
    return 0


def _launch(config: Path, cfg: RunConfig, overrides: tuple[str, ...], resume: str, workers: int, meeting: dict[str, Any]) -> int:
    """One run to its end; the exit code."""
    from dnc_dist.processes.launch import launch_workers

    command = [sys.executable, "-m", "dnc_dist", "train", "--resume", resume]
    command += [*(part for override in overrides for part in ("--set", override)), "--", str(config)]
    terms = {"--resume": resume, **dict(dotted(cfg.model_dump(mode="json")))}
    # Each machine may have its own copy of the data, which workers compare, and its own place for what it keeps of a server.
    for key in ("data.root", "data.cache", "data.cache_gb"):
        del terms[key]
    secret_file = cfg.run.path.with_name(f".{cfg.run.path.name}.launch-secret")
    return launch_workers(command, workers, secret_file=secret_file, terms=terms, **meeting)


def _dry_run(cfg: RunConfig, world: int) -> int:
    from dnc_dist.engine.dry_run import dry_run

    click.echo(dry_run(cfg, world))
    return 0
