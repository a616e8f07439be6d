"""The checkpoints of a run: written whole or not at all, verified before they are read, pruned.

DeepSpeed writes into a temporary tag; when every rank is done, rank 0 lists the files with sizes and checksums, forces them to
disk, renames the tag and moves the pointer ``latest`` by rename. A crash at any moment leaves the previous checkpoint untouched.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dnc_dist import distributed
from dnc_dist.engine.repartition import cut_partition, num_partitions
from dnc_dist.engine.state import TrainState
from dnc_dist.errors import InputError, RunError

_MANIFEST = "files.json"
_BLOCK = 1 << 20
_log = logging.getLogger(__name__)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(path: Path) -> int:
    """Checksum of a file's bytes; about a second per GB."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


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
            RunError: it cannot be written; the checkpoints before it are untouched.
        """
        tag, temporary = f"step-{state.step:08d}", f".step-{state.step:08d}.tmp"
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.folder / temporary, ignore_errors=True)
        distributed.barrier()
        client_state = {"train_state": state.state_dict(), "world_size": distributed.world_size()}
        try:
            engine.save_checkpoint(str(self.folder), tag=temporary, client_state=client_state, save_latest=False)
        except (OSError, RuntimeError) as error:
            # On a full disk torch's writer only speaks of positions; other RuntimeErrors come from lost peers.
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            raise self._unwritable(tag, error) from error
        distributed.barrier()
        if distributed.is_main():
            try:
                self._publish(temporary, tag, best)
            except OSError as error:
                raise self._unwritable(tag, error) from error
        distributed.barrier()
        return self.folder / tag

    def _unwritable(self, tag: str, error: Exception) -> RunError:
        free = shutil.disk_usage(self.folder).free / 2**20
        why = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        return RunError(f"{self.folder / tag} cannot be written{why}, {free:.0f} MB are free there; `--resume auto` goes on later")

    def _publish(self, temporary: str, tag: str, best: bool) -> None:
        folder = self.folder / temporary
        files = sorted(folder.iterdir())
        for file in files:
            _fsync(file)
        # Checksums of several files at a time; they release the interpreter's lock.
        with ThreadPoolExecutor() as pool:
            entries = {file.name: [file.stat().st_size, checksum] for file, checksum in zip(files, pool.map(_crc32, files), strict=True)}
        write_atomically(folder / _MANIFEST, json.dumps(entries, indent=1))
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
        folder = self.folder / tag
        try:
            entries = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            files = {folder / name: (size, checksum) for name, (size, checksum) in entries.items()}
        except (OSError, ValueError) as error:
            return f"{_MANIFEST}: {error}"
        for file, (size, _) in files.items():
            if not file.exists():
                return f"{file.name} is missing"
            if file.stat().st_size != size:
                return f"{file.name} has {file.stat().st_size} bytes instead of {size}"
        with ThreadPoolExecutor() as pool:
            for (file, (_, checksum)), found in zip(files.items(), pool.map(_crc32, files), strict=True):
                if found != checksum:
                    return f"{file.name} holds other bytes than were written"
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
        """Collective. Restore parameters and optimizer of the engine, whatever number of processes wrote them.

        Raises:
            InputError: DeepSpeed does not find the checkpoint's files.
        """
        folder, world = self.folder / tag, distributed.world_size()
        repartition = num_partitions(folder) not in (0, world)
        path, saved = engine.load_checkpoint(str(self.folder), tag, load_optimizer_states=not repartition)
        if path is None:
            raise InputError(f"{folder}: DeepSpeed could not read this checkpoint")
        if saved["world_size"] != world:
            _log.info(f"checkpoint {folder} was written by {saved['world_size']} process(es) and goes on with {world}")
        if repartition:
            sizes = [group["params"][0].numel() for group in engine.optimizer.param_groups]
            part = cut_partition(folder, distributed.rank(), sizes)
            # DeepSpeed picks the entry of this rank.
            engine.optimizer.load_state_dict([part] * world, load_from_fp32_weights=True)

    def has_best(self) -> bool:
        """Whether a checkpoint was marked as the best."""
        return self._pointer("best") is not None

    def read(self, tag: str) -> tuple[dict[str, Any], TrainState]:
        """The objective's weights and the train state; needs no engine, on any number of processes."""
        content = torch.load(self.folder / tag / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        return content["module"], TrainState.from_state_dict(content["train_state"])
