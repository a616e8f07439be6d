"""The checkpoints of a run: published whole or not at all, verified before they are read, pruned.

All ranks write into a temporary folder (see ``writing``). When every rank is done, rank 0 lists the files with sizes and checksums,
renames the folder and moves the pointer ``latest`` by rename. A crash at any moment leaves the previous checkpoint untouched.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.base.files import sync, write_text
from dnc_dist.base.foreign import parse_json, read_bytes, read_text, shorten
from dnc_dist.rundir import CHECKPOINTS

_TAG = re.compile(r"step-\d{8}")
# What a crash leaves behind of a checkpoint that was being written or replaced.
_UNFINISHED = re.compile(r"\.(step-\d{8})\.(tmp|old)")
# torch's writer of files raises no OSError.
_OF_TORCHS_WRITER = re.compile(r"inline_container|Parent directory .* does not exist")
_MANIFEST = "files.json"
_BLOCK = 1 << 20


def tag_of(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def temporary(tag: str) -> str:
    """The name of a checkpoint's folder until it is published."""
    return f".{tag}.tmp"


def crc32(path: Path) -> int:
    """Checksum of a file's bytes; about a second per GB."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.folder, self.keep = run_dir / CHECKPOINTS, keep

    def make_room(self, tag: str) -> None:
        """Remove what an attempt to write this checkpoint left, so that its temporary folder can be filled."""
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder / temporary(tag), ignore_errors=True)

    def unwritable(self, tag: str, error: Exception) -> Exception:
        """What a run ends with whose checkpoint cannot be written because of this error; other errors come back."""
        # On a full disk torch's writer only speaks of positions. Other RuntimeErrors come from lost peers and from devices.
        if not isinstance(error, OSError) and not (isinstance(error, RuntimeError) and _OF_TORCHS_WRITER.search(str(error))):
            return error
        there = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free / 2**20
        why = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        return RunError(f"{self.folder / tag} cannot be written{why}, {free:.0f} MB are free there; `--resume auto` goes on later")

    def publish(self, tag: str, files: Mapping[str, tuple[int, int]], *, best: bool) -> None:
        """Give a checkpoint its name, move ``latest`` (and ``best``) to it, and prune others.

        The newest ``keep`` up to this one stay, and the best. What is newer than this one was abandoned by a resume before it.

        Args:
            tag: its name.
            files: size and checksum of each file, by name; all of them are on the disk.
            best: whether it is the best so far.

        Raises:
            OSError: that cannot be written; the checkpoints before it are untouched.
        """
        folder, final = self.folder / temporary(tag), self.folder / tag
        best_before = self._pointer("best")  # now: it cannot be that this one is there, and the disk fails at reading that
        write_text(folder / _MANIFEST, json.dumps(dict(sorted(files.items())), indent=1))
        if final.exists():
            # The same step again, for example stopped right after a save: only the train state can have moved on.
            replaced = self.folder / f".{tag}.old"
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
            folder.rename(final)
            shutil.rmtree(replaced)
        else:
            folder.rename(final)
        sync(self.folder)
        write_text(self.folder / "latest", tag)
        if best:
            write_text(self.folder / "best", tag)
        elif best_before is not None and best_before > tag:
            (self.folder / "best").unlink()
        past = [old for old in self.tags() if old <= tag]
        for old in set(self.tags()) - set(past[-self.keep :]) - {tag if best else best_before}:
            shutil.rmtree(self.folder / old)

    def clean_up(self) -> None:
        """Undo what a crash interrupted: put back a checkpoint that was about to be replaced, remove half-written ones."""
        left = [(path, name) for path in self._entries() if (name := _UNFINISHED.fullmatch(path.name))]
        for path, name in left:
            if name[2] == "old" and not (self.folder / name[1]).exists():
                path.rename(self.folder / name[1])
            else:
                shutil.rmtree(path)

    def tags(self) -> list[str]:
        """Published checkpoints, oldest first; folders of other names, such as copies, are the user's own."""
        return sorted(path.name for path in self._entries() if _TAG.fullmatch(path.name))

    def _entries(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_dir() and not path.is_symlink()] if self.folder.is_dir() else []

    def _pointer(self, name: str) -> str | None:
        """The checkpoint that a pointer names; None: no pointer, or one that names none that is there.

        Raises:
            OSError: the machine cannot read it. No checkpoint may be removed or passed over because of that.
        """
        try:
            tag = read_text(self.folder / name, most=1 << 10).strip()
        except InputError:
            return None
        return tag if tag in self.tags() else None

    def _damage(self, tag: str) -> str | None:
        """What is wrong with a checkpoint's files; None: nothing."""
        folder = self.folder / tag
        try:
            entries = parse_json(read_bytes(folder / _MANIFEST), dict[str, tuple[int, int]], _MANIFEST)
        except InputError as error:
            return str(error)
        if other := [name for name in entries if name != Path(name).name or name in ("", "..")]:
            return f"{_MANIFEST} names {shorten(other[0])}, which is not in this folder"
        files = {folder / name: entry for name, entry in entries.items()}
        for file, (size, _) in files.items():
            if not file.is_file():
                return f"{file.name} is missing"
            if file.stat().st_size != size:
                return f"{file.name} has {file.stat().st_size} bytes instead of {size}"
        with ThreadPoolExecutor() as pool:
            for (file, (_, checksum)), found in zip(files.items(), pool.map(crc32, files), strict=True):
                if found != checksum:
                    return f"{file.name} holds other bytes than were written"
        return None

    def find(self, which: str = "latest") -> tuple[str, list[str]] | None:
        """The tag to load and a message for each damaged newer checkpoint; None if there is no checkpoint at all.

        Args:
            which: "latest" falls back to the newest undamaged checkpoint; "best" and tags do not.

        Raises:
            InputError: there are checkpoints, but the wanted one, or for "latest" every one, is damaged or missing.
            OSError: the machine cannot read one that is there.
        """
        tags = self.tags()
        if not tags and which == "latest":
            return None
        wanted = self._pointer(which) if which in ("latest", "best") else which
        messages: list[str] = []
        if which == "latest":
            pointer = self.folder / "latest"
            if wanted is None and pointer.exists():
                messages.append(f"{pointer} names no checkpoint that is there; the newest whole one is used")
            candidates = [tag for tag in reversed(tags) if wanted is None or tag <= wanted]
        elif which == "best" and wanted is None:
            raise InputError(f"{self.folder / which} names no checkpoint that is there; use --checkpoint last")
        elif wanted not in tags:
            raise InputError(f"{self.folder} has no checkpoint {wanted}; it has {', '.join(tags) or 'none'}")
        else:
            candidates = [wanted]
        for tag in candidates:
            if (damage := self._damage(tag)) is None:
                return tag, messages
            messages.append(f"checkpoint {self.folder / tag} is damaged ({damage}); not used")
        cure = "remove the folder to start over" if which == "latest" else "choose another one"
        raise InputError("\n".join([*messages, f"{self.folder}: no usable checkpoint; {cure}"]))

    def choose(self, which: str) -> tuple[str, list[str]]:
        """The tag to use after training, and messages as ``find`` gives them.

        Args:
            which: "best" (the last one, if no split selected a best), "last", or a tag.

        Raises:
            InputError: there is none, or it is damaged.
        """
        last = which == "last" or (which == "best" and not self.has_best())
        if (found := self.find("latest" if last else which)) is None:
            raise InputError(
                f"{self.folder.parent} has no checkpoint; train it with `dnc-dist launch`, or give the run that a model was exported from"
            )
        return found

    def empty(self) -> bool:
        """Whether there is no checkpoint, not even one that ``clean_up`` puts back."""
        names = [path.name for path in self._entries()]
        return not any(_TAG.fullmatch(name) or ((left := _UNFINISHED.fullmatch(name)) and left[2] == "old") for name in names)

    def has_best(self) -> bool:
        """Whether a checkpoint was marked as the best."""
        return (self.folder / "best").exists()
