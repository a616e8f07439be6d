"""``dnc-dist doctor``: prove on the user's own machine what the project promises."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dnc_dist.base.errors import RunError
from dnc_dist.commands.train import overrides_option

if TYPE_CHECKING:
    from dnc_dist.config import RunConfig

CHECKS = ("env", "data", "network", "parity")


@click.command(short_help="Check this machine: environment, data, network, parity.")
@click.argument("words", nargs=-1, metavar="[env|data|network|parity] [CONFIG]")
@click.option("--nproc", type=click.IntRange(min=1), help="Workers on this machine.  [default: number of GPUs; without a GPU 2]")
@click.option("--decode", type=click.Choice(["sample", "all"]), default="sample", show_default=True, help="data: which images to decode.")
@click.option(
    "--losses", type=click.Choice(["default", "all"]), default="default", show_default=True, help="parity without a CONFIG: which losses."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@overrides_option
def doctor(words: tuple[str, ...], nproc: int | None, decode: str, losses: str, as_json: bool, overrides: tuple[str, ...]) -> int:
    """Check whether training works here as promised: one of these, or all that apply (data with a CONFIG only).

    \b
    env      versions, GPUs, kernels, CPU, memory, disks, shared folders, clocks
    data     CONFIG's dataset: the same on every rank, complete, readable
    network  speed of all-reduce and all-gather between the workers
    parity   loss and gradients on all workers against those on one; with a CONFIG of its loss, masks and learners

    It starts its workers itself; started by srun or torchrun, it is one of them. Exit code 1: a check failed.
    """
    names, config = _parse(words, overrides, losses)
    # Before torch is imported: its store warns about every address that no name belongs to.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from dnc_dist.processes.worker import is_worker, run_worker

    if is_worker():
        if nproc:
            raise click.UsageError("--nproc starts workers, but srun or torchrun has already started this one; leave it out")
        return run_worker(lambda: _work(names, config, overrides, (decode, losses), as_json))
    _load(config, overrides)

    from dnc_dist.processes.launch import launch_workers, workers_here

    command = [sys.executable, "-m", "dnc_dist", "doctor", *words, "--decode", decode, "--losses", losses, *(["--json"] if as_json else [])]
    command += [part for override in overrides for part in ("--set", override)]
    return launch_workers(command, workers_here(nproc))


def _work(names: tuple[str, ...], config: Path | None, overrides: tuple[str, ...], much: tuple[str, str], as_json: bool) -> None:
    cfg = _load(config, overrides)

    from dnc_dist.doctor.run import Wanted, run_checks
    from dnc_dist.processes import distributed

    distributed.init(cfg.engine.timeout)
    wanted = Wanted(config is not None, decode_all=much[0] == "all", all_losses=much[1] == "all")
    failed = run_checks(names, cfg, wanted, json=as_json)
    distributed.shutdown()
    if failed:
        raise RunError(f"{len(failed)} check(s) failed: {', '.join(failed)}")


def _parse(words: tuple[str, ...], overrides: tuple[str, ...], losses: str) -> tuple[tuple[str, ...], Path | None]:
    """Which checks, and the configuration's file.

    Raises:
        UsageError: words that are neither, or that do not fit together.
    """
    check = words[0] if words and words[0] in CHECKS else None
    rest = words[1:] if check else words
    if len(rest) > 1:
        raise click.UsageError(f"give one of {', '.join(CHECKS)} (or none, for all of them) and at most one CONFIG, not {' '.join(words)}")
    config = Path(rest[0]) if rest else None
    if config is not None and check is None and not config.exists():
        raise click.UsageError(f"{config} is neither a configuration file nor one of the checks {', '.join(CHECKS)}")
    if config is None and check == "data":
        raise click.UsageError("data needs a CONFIG, whose data.root it looks at")
    if config is not None and check in (None, "parity") and losses == "all":
        raise click.UsageError("--losses all checks every loss of the table; leave out the CONFIG, whose own loss is checked instead")
    if config is None and overrides:
        raise click.UsageError("--set changes a CONFIG; give one")
    every = tuple(name for name in CHECKS if name != "data" or config is not None)
    return (check,) if check else every, config


def _load(config: Path | None, overrides: tuple[str, ...]) -> RunConfig:
    from dnc_dist.config import load_config, parse_tree

    return load_config(config, overrides) if config is not None else parse_tree({"data": {"root": "."}}, "doctor")
