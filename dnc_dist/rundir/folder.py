"""The run directory: made, locked, and checked to belong to the run that is to go on in it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TextIO

from dnc_dist.base import part_modules
from dnc_dist.base.errors import InputError, RunError
from dnc_dist.base.files import is_part_of, lock, write_text
from dnc_dist.config import MACHINE_KEYS, RunConfig, dump_config, load_config
from dnc_dist.processes import distributed
from dnc_dist.rundir import CHECKPOINTS, CONFIG_FILE, DIVISIONS, METRICS_FILE
from dnc_dist.rundir.checkpoints import Checkpoints
from dnc_dist.rundir.tracker import check_tracker, read_metrics

FIXED_SECTIONS = ("model", "data", "division", "loss")
"""Sections that decide what a checkpoint means; a resumed run may not change them."""
_LOCK = ".lock"
_log = logging.getLogger(__name__)


class RunDirectory:
    """The run directory of this process, made and locked for the life of it by rank 0.

    A record lock belongs to the process alone; the loader's forked workers, which may outlive it for a moment, do not hold it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: TextIO | None = None

    def prepare(self, cfg: RunConfig, resume: str) -> str:
        """Create the directory with its ``config.yaml``, or check that it belongs to this very run; what the user should know of it.

        Rank 0 only.

        Raises:
            InputError: the directory holds another run, or ``resume`` is "never" and it holds any, it cannot be written, or the
                tracker cannot work here.
        """
        check_tracker(cfg.tracker.kind)
        try:
            return self._prepare(cfg, resume)
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written ({error.strerror}); set run.dir to a folder that every process may write to"
            ) from error

    def division_file(self, epoch: int) -> Path:
        """Where the division made before this epoch is written."""
        folder = self.path / DIVISIONS
        folder.mkdir(exist_ok=True)
        return folder / f"epoch-{epoch:04d}.npz"

    def check(self) -> None:
        """Collective. End the run if nothing can be saved here any more.

        Raises:
            RunError: somebody removed the directory or its checkpoints.
        """
        if distributed.broadcast_object(self._lock is not None and self._gone(self._lock)):
            raise RunError(
                f"{self.path} was removed, or its {CHECKPOINTS} were, while the run was training in it; nothing more can be saved there"
            )

    def _gone(self, lock: TextIO) -> bool:
        try:
            # The open file keeps its identity; the one of that name is another one once the directory was removed and made again.
            same = os.path.samestat(os.fstat(lock.fileno()), os.stat(self.path / _LOCK))
        except FileNotFoundError:
            return True
        return not same or not (self.path / CHECKPOINTS).is_dir()

    def _prepare(self, cfg: RunConfig, resume: str) -> str:
        config = self.path / CONFIG_FILE
        checkpoints = Checkpoints(self.path, cfg.checkpoint.keep)
        if not config.exists() and self.path.exists() and any(not _left_by_a_start(entry) for entry in self.path.iterdir()):
            raise InputError(
                f"{self.path} exists and is no run directory (it has no {CONFIG_FILE}); set run.dir or run.name to another folder"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        checkpoints.clean_up()
        if resume == "never" and (checkpoints.tags() or (self.path / METRICS_FILE).exists()):
            raise InputError(f"{self.path} already holds a run; use --resume auto to go on with it, or set run.name to start another")
        epoch = _last_epoch(self.path / METRICS_FILE)
        if checkpoints.tags():
            check_unchanged(cfg)
        elif epoch > 0:
            # Every epoch ends with a checkpoint: there were some.
            raise InputError(
                f"{self.path} holds a run that came to epoch {epoch}, but none of its checkpoints; put them back to resume it, remove "
                "the folder to start over, or set run.name to start another"
            )
        if checkpoints.tags():
            return ""
        write_config(cfg)
        checkpoints.folder.mkdir(exist_ok=True)
        return f"{self.path} holds a run that ended before its first checkpoint; it starts over" if epoch >= 0 else ""

    def _take_lock(self) -> None:
        """Two trainings in one directory would destroy each other's checkpoints."""
        busy = f"another process is training in {self.path}; wait for it, stop it, or set run.name to start another run"
        self._lock = lock(self.path / _LOCK, busy)


def _left_by_a_start(entry: Path) -> bool:
    """Whether a start leaves this that ends before ``config.yaml`` is written, as on a full disk."""
    return entry.name == _LOCK or is_part_of(entry, CONFIG_FILE)


def _last_epoch(metrics: Path) -> int:
    """The last epoch with a training line; -1 without any."""
    if not metrics.exists():
        return -1
    return max((line["epoch"] for line in read_metrics(metrics) if line["kind"] == "train"), default=-1)


def write_config(cfg: RunConfig) -> None:
    """Write ``config.yaml`` into the run directory; its folders are absolute, so that the run can be read from anywhere."""
    run = cfg.run.model_copy(update={"dir": cfg.run.dir.absolute()})
    root = cfg.data.root
    data = cfg.data.model_copy(update={"root": root.absolute() if isinstance(root, Path) else root})
    write_text(cfg.run.path / CONFIG_FILE, dump_config(cfg.model_copy(update={"run": run, "data": data})))


def load_run_config(run_dir: Path) -> RunConfig:
    """The configuration that a run directory was made with. The directory may be somebody else's: no code in it is executed.

    Raises:
        InputError: this is no run directory, or its ``config.yaml`` was damaged.
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{run_dir} is no run directory: it has no {CONFIG_FILE}; give the folder that `dnc-dist launch` printed")
    part_modules.never_from(run_dir)
    return load_config(path, code_beside=False)


def check_unchanged(cfg: RunConfig) -> None:
    """Check that the run in a configuration's directory was begun with its values, as far as they have to stay.

    Raises:
        InputError: it was not.
    """
    if changed := changed_keys(load_run_config(cfg.run.path), cfg):
        raise InputError(
            f"{cfg.run.path} holds a run with other values of {', '.join(changed)}; undo the change to resume it (what is `auto` may "
            "follow from another key), or set run.name to start another"
        )


def changed_keys(before: RunConfig, now: RunConfig) -> list[str]:
    """Keys of the fixed sections, and further fixed keys, whose values differ, as ``section.key (old -> new)``."""
    changes = []
    for section in FIXED_SECTIONS:
        old, new = getattr(before, section).model_dump(mode="json"), getattr(now, section).model_dump(mode="json")
        for key in sorted(old.keys() | new.keys()):
            if f"{section}.{key}" not in MACHINE_KEYS and old.get(key) != new.get(key):
                changes.append(f"{section}.{key} ({old.get(key)} -> {new.get(key)})")
    if before.run.seed != now.run.seed:
        changes.append(f"run.seed ({before.run.seed} -> {now.run.seed})")
    for key in ("batch_size", "samples_per_class", "epoch_length"):
        # A checkpoint counts the batches of its epoch, and these say what a batch is.
        if getattr(before.schedule, key) != getattr(now.schedule, key):
            changes.append(f"schedule.{key} ({getattr(before.schedule, key)} -> {getattr(now.schedule, key)})")
    if before.engine.zero != now.engine.zero:
        # DeepSpeed lays its checkpoints out by stage and cannot read those of another one.
        changes.append(f"engine.zero ({before.engine.zero} -> {now.engine.zero})")
    return changes
