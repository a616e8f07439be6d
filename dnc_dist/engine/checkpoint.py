"""The run directory and its checkpoints: written whole or not at all, verified before they are read, pruned.

DeepSpeed writes into a temporary tag; when every rank is done, rank 0 lists the files with their sizes, forces them to disk,
renames the tag and moves the pointer ``latest`` by rename. A crash at any moment leaves the previous checkpoint untouched.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

import torch

from dnc_dist import distributed
from dnc_dist.config import RunConfig, dump_config, load_config
from dnc_dist.engine.state import TrainState
from dnc_dist.errors import InputError

FIXED_SECTIONS = ("model", "data", "division", "loss")
"""Sections that decide what a checkpoint means; a resumed run may not change them."""
FREE_KEYS = {("data", "root"), ("data", "workers")}
_MANIFEST = "files.json"
_LOCK = ".lock"
_log = logging.getLogger(__name__)
_locks: list[TextIO] = []
# Lets DeepSpeed convert a ZeRO 1 or 2 checkpoint for another number of ranks.
_UNIVERSAL = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file: readers see the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _fsync(temporary)
    temporary.rename(path)
    _fsync(path.parent)


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.folder, self.keep = run_dir / "checkpoints", keep

    def save(self, engine: Any, state: TrainState, *, best: bool = False) -> Path:
        """Collective. Write a checkpoint of the engine and the state, move ``latest`` (and ``best``) to it, prune others.

        The newest ``keep`` up to this one stay, and the best. What is newer than this one was abandoned by a resume before it.

        Raises:
            OSError: it cannot be written; the checkpoints before it are untouched.
        """
        tag, temporary = f"step-{state.step:08d}", f".step-{state.step:08d}.tmp"
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.folder / temporary, ignore_errors=True)
        distributed.barrier()
        client_state = {"train_state": state.state_dict(), "world_size": distributed.world_size()} | _UNIVERSAL
        try:
            engine.save_checkpoint(str(self.folder), tag=temporary, client_state=client_state, save_latest=False)
        except (OSError, RuntimeError) as error:
            # On a full disk torch's writer only speaks of positions; other RuntimeErrors come from lost peers.
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            free = shutil.disk_usage(self.folder).free / 2**20
            raise OSError(f"{self.folder / tag} cannot be written, {free:.0f} MB are free there; `--resume auto` goes on later") from error
        distributed.barrier()
        if distributed.is_main():
            self._publish(temporary, tag, best)
        distributed.barrier()
        return self.folder / tag

    def _publish(self, temporary: str, tag: str, best: bool) -> None:
        folder = self.folder / temporary
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        for name in sizes:
            _fsync(folder / name)
        write_atomically(folder / _MANIFEST, json.dumps(sizes, indent=1))
        final = self.folder / tag
        if final.exists():
            # The same step again, for example stopped right after a save: only the train state can have moved on.
            replaced = self.folder / f".{tag}.old"
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
            folder.rename(final)
            shutil.rmtree(replaced)
        else:
            folder.rename(final)
        _fsync(self.folder)
        write_atomically(self.folder / "latest", tag)
        if best:
            write_atomically(self.folder / "best", tag)
        if (self._pointer("best") or "") > tag:
            (self.folder / "best").unlink()
        past = [old for old in self.tags() if old <= tag]
        for old in set(self.tags()) - set(past[-self.keep :]) - {self._pointer("best")}:
            shutil.rmtree(self.folder / old)

    def clean_up(self) -> None:
        """Undo what a crash interrupted: put back a checkpoint that was about to be replaced, remove half-written ones."""
        for replaced in self.folder.glob(".step-*.old"):
            final = self.folder / replaced.name.removeprefix(".").removesuffix(".old")
            if not final.exists():
                replaced.rename(final)
        for left in self.folder.glob(".step-*"):
            shutil.rmtree(left)

    def tags(self) -> list[str]:
        """Published checkpoints, oldest first."""
        return sorted(path.name for path in self.folder.glob("step-*")) if self.folder.is_dir() else []

    def _pointer(self, name: str) -> str | None:
        path = self.folder / name
        return path.read_text(encoding="utf-8").strip() if path.exists() else None

    def _damage(self, tag: str) -> str | None:
        """What is wrong with a checkpoint's files; None: nothing."""
        try:
            sizes = json.loads((self.folder / tag / _MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"{_MANIFEST}: {error}"
        for name, size in sizes.items():
            file = self.folder / tag / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
        return None

    def find(self, which: str = "latest") -> tuple[str, list[str]] | None:
        """The tag to load and a message for each damaged newer checkpoint; None if there is no checkpoint at all.

        Args:
            which: "latest" falls back to the newest undamaged checkpoint; "best" and tags do not.

        Raises:
            InputError: there are checkpoints, but the wanted one, or for "latest" every one, is damaged or missing.
        """
        wanted = self._pointer(which) if which in ("latest", "best") else which
        if wanted is None and not self.tags():
            return None
        if which != "latest" and wanted not in self.tags():
            raise InputError(f"{self.folder} has no checkpoint {wanted or which}; it has {', '.join(self.tags()) or 'none'}")
        candidates = [tag for tag in reversed(self.tags()) if wanted is None or tag <= wanted] if which == "latest" else [str(wanted)]
        messages: list[str] = []
        for tag in candidates:
            if (damage := self._damage(tag)) is None:
                return tag, messages
            messages.append(f"checkpoint {self.folder / tag} is damaged ({damage}); not used")
        cure = "remove the folder to start over" if which == "latest" else "choose another one"
        raise InputError("\n".join([*messages, f"{self.folder}: no usable checkpoint; {cure}"]))

    def load(self, engine: Any, tag: str) -> None:
        """Collective. Restore parameters and optimizer of the engine.

        Raises:
            InputError: the checkpoint was written by another number of processes.
        """
        ranks = len(list((self.folder / tag).glob("*_optim_states.pt"))) or None
        if ranks is not None and ranks != distributed.world_size():
            raise InputError(
                f"{self.folder / tag} was written by {ranks} processes and this run has {distributed.world_size()}; "
                f"start with --nproc {ranks}"
            )
        path, _ = engine.load_checkpoint(str(self.folder), tag)
        if path is None:
            raise InputError(f"{self.folder / tag}: DeepSpeed could not read this checkpoint")

    def has_best(self) -> bool:
        """Whether a checkpoint was marked as the best."""
        return self._pointer("best") is not None

    def read(self, tag: str) -> tuple[dict[str, Any], TrainState]:
        """The objective's weights and the train state; needs no engine, on any number of processes."""
        path = self.folder / tag / "mp_rank_00_model_states.pt"
        try:
            content = torch.load(path, map_location="cpu", weights_only=False)
        except Exception as error:  # damaged bytes make the reader fail in any way
            raise InputError(f"{path} is damaged; remove {path.parent} to use the checkpoint before it") from error
        return content["module"], TrainState.from_state_dict(content["train_state"])


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
