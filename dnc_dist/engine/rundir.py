"""The run directory: made, locked, and checked to belong to the run that is to go on in it."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path
from typing import TextIO

from dnc_dist.config import RunConfig, dump_config, load_config
from dnc_dist.engine.checkpoint import Checkpoints, write_atomically
from dnc_dist.errors import InputError

FIXED_SECTIONS = ("model", "data", "division", "loss")
"""Sections that decide what a checkpoint means; a resumed run may not change them."""
FREE_KEYS = {("data", "root"), ("data", "workers")}
_LOCK = ".lock"
_log = logging.getLogger(__name__)
_locks: list[TextIO] = []


def prepare_run_dir(cfg: RunConfig, resume: str) -> None:
    """Create the run directory with its ``config.yaml``, or check that it belongs to this very run. Rank 0 only.

    Raises:
        InputError: the directory holds another run, or ``resume`` is "never" and it holds any, or it cannot be written.
    """
    try:
        _prepare(cfg, resume)
    except OSError as error:
        raise InputError(
            f"{cfg.run.path} cannot be written ({error.strerror}); set run.dir to a folder that every process may write to"
        ) from error


def _prepare(cfg: RunConfig, resume: str) -> None:
    path = cfg.run.path / "config.yaml"
    checkpoints = Checkpoints(cfg.run.path, cfg.checkpoint.keep)
    if not path.exists() or not checkpoints.tags():
        if not path.exists() and cfg.run.path.exists() and any(entry.name != _LOCK for entry in cfg.run.path.iterdir()):
            raise InputError(
                f"{cfg.run.path} exists and is no run directory (it has no config.yaml); set run.dir or run.name to another folder"
            )
        cfg.run.path.mkdir(parents=True, exist_ok=True)
        _lock(cfg.run.path)
        write_config(cfg)
        checkpoints.clean_up()
        return
    if resume == "never":
        raise InputError(f"{cfg.run.path} already holds a run; use --resume auto to go on with it, or set run.name to start another")
    changed = changed_keys(load_run_config(cfg.run.path), cfg)
    if changed:
        raise InputError(
            f"{cfg.run.path} holds a run with other values of {', '.join(changed)}; undo the change to resume it, "
            "or set run.name to start another"
        )
    _lock(cfg.run.path)
    checkpoints.clean_up()


def _lock(run_dir: Path) -> None:
    """Take the run directory for the life of this process: two trainings in one would destroy each other's checkpoints.

    A record lock belongs to the process alone; the loader's forked workers, which may outlive it for a moment, do not hold it.
    """
    file = (run_dir / _LOCK).open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process is training in {run_dir}; wait for it, stop it, or set run.name to start another run") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        _log.warning("%s: this file system has no locks; take care that only one training at a time uses the folder", run_dir)
    _locks.append(file)


def write_config(cfg: RunConfig) -> None:
    """Write ``config.yaml`` into the run directory."""
    write_atomically(cfg.run.path / "config.yaml", dump_config(cfg))


def load_run_config(run_dir: Path) -> RunConfig:
    """The configuration that a run directory was made with.

    Raises:
        InputError: this is no run directory, or its ``config.yaml`` was damaged.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise InputError(f"{run_dir} is no run directory: it has no config.yaml; give the folder that `dnc-dist launch` printed")
    return load_config(path)


def changed_keys(before: RunConfig, now: RunConfig) -> list[str]:
    """Keys of the fixed sections, and further fixed keys, whose values differ, as ``section.key (old -> new)``."""
    changes = []
    for section in FIXED_SECTIONS:
        old, new = getattr(before, section).model_dump(mode="json"), getattr(now, section).model_dump(mode="json")
        for key in sorted(old.keys() | new.keys()):
            if (section, key) not in FREE_KEYS and old.get(key) != new.get(key):
                changes.append(f"{section}.{key} ({old.get(key)} -> {new.get(key)})")
    if before.run.seed != now.run.seed:
        changes.append(f"run.seed ({before.run.seed} -> {now.run.seed})")
    for key in ("batch_size", "samples_per_class", "epoch"):
        # A checkpoint counts the batches of its epoch, and these say what a batch is.
        if getattr(before.schedule, key) != getattr(now.schedule, key):
            changes.append(f"schedule.{key} ({getattr(before.schedule, key)} -> {getattr(now.schedule, key)})")
    if before.engine.zero != now.engine.zero:
        # DeepSpeed lays its checkpoints out by stage and cannot read those of another one.
        changes.append(f"engine.zero ({before.engine.zero} -> {now.engine.zero})")
    return changes
