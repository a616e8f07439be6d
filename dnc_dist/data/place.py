"""The folder of a data set has one writer at a time, and what it did not write stays.

A writer holds a lock inside the folder and collects its files in a hidden folder beside it, so that a mount point serves as well as
any other folder. At the end they are renamed into place, the manifest last: killed at any moment, the folder holds the old data
set or none. The next writer goes on with the shards that a dead one of the same data set finished, and removes everything else that
is left of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.base.files import sync
from dnc_dist.base.foreign import shorten
from dnc_dist.data.manifest import INDEX, JOURNAL, MANIFEST, STAGING, read_manifest

_log = logging.getLogger(__name__)
# Inside the staging folder. The last two say whose files lie in the folder when a writer is killed between its renames.
_LOCK, _COMMITTED, _REPLACED = "lock", "committed.json", "replaced.json"
# Files of a data set whose manifest is damaged or of another version.
_OURS = re.compile(
    rf"(train|validation|test)-[0-9]{{6,9}}\.tar|{INDEX}/[a-z0-9_]+\.npy|contact_sheet\.png"
    r"|(manifest|classes|duplicates|committed|replaced)\.json|journal\.jsonl"
)
# Made by file systems and desktops, as is everything that begins with a dot: neither in the way nor touched.
_IGNORED = {"lost+found"}


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[Path]:
    """Hold ``out``, made if it is missing, and give the folder inside it where files are collected.

    An interrupted writer's shards and journal are still there; they stay there, too, if this one is interrupted.

    Raises:
        InputError: ``out`` is no folder, or another process writes into it.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is no folder; use another --out")
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    staging = out / STAGING
    try:
        lock = _lock(out)
        try:
            _clean(out, interrupted=True)
            yield staging
            _clean(out)
        except (KeyboardInterrupt, RunError):
            _clean(out, interrupted=True)
            raise
        except BaseException:
            _clean(out)
            raise
        finally:
            (staging / _LOCK).unlink()
            _remove_folder(staging)
            os.close(lock)
    finally:
        if made:
            _remove_folder(out)


def check_free(out: Path, replace: bool) -> None:
    """Refuse a folder that holds something else than what may be replaced.

    Raises:
        InputError: there are other files, or a data set that is not to be replaced.
    """
    prepared = (out / MANIFEST).is_file()
    if prepared and not replace:
        raise InputError(f"{out} already holds another prepared data set; use --force to replace it, or another --out")
    if others := sorted(_files(out) - (_files_of_dataset(out) if prepared else set())):
        named = ", ".join(shorten(name) for name in others[:3]) + (f" and {len(others) - 3:,} more" if len(others) > 3 else "")
        raise InputError(f"{out} already holds other files ({named}), which stay as they are; move them away or use another --out")


def commit(out: Path, replace: bool) -> None:
    """Move the data set that was collected in the staging folder into ``out``, in place of the one that may be replaced.

    Raises:
        InputError: other files came into ``out`` meanwhile.
    """
    staging = out / STAGING
    names = sorted(_files(staging) - {_LOCK, JOURNAL, MANIFEST})
    for name in (*names, MANIFEST):
        sync(staging / name)
    # Only now: what takes long is done, and from here on nothing is awaited.
    check_free(out, replace)
    os.rename(staging / MANIFEST, staging / _COMMITTED)
    if (out / MANIFEST).is_file():
        old = _files_of_dataset(out)
        os.rename(out / MANIFEST, staging / _REPLACED)
        _remove(out, old)
    for name in sorted({Path(name).parts[0] for name in names}):
        if os.path.lexists(out / name):
            raise InputError(f"{out / name} came into being meanwhile; move it away and prepare again")
        os.rename(staging / name, out / name)
    os.rename(staging / _COMMITTED, out / MANIFEST)
    sync(out)


def _lock(out: Path) -> int:
    path = out / STAGING / _LOCK
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # another process ended and removed the folder just now
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(f"another `dnc-dist data prepare` is writing into {out}; wait for it, or use another --out") from None
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                _log.warning("%s: this file system has no locks; take care that only one `dnc-dist data prepare` writes there", out)
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)


def _clean(out: Path, interrupted: bool = False) -> None:
    """Remove what a writer left that did not come to its end; a data set that is complete stays.

    Args:
        out: the folder.
        interrupted: leave shards and journal, for a writer that goes on.
    """
    staging = out / STAGING
    if not (out / MANIFEST).exists():
        # What is still in the staging folder was never moved: a file of that name in the other folder is somebody else's.
        unmoved = _files(staging) if staging.exists() else set()
        for name in (_COMMITTED, _REPLACED):
            if (staging / name).is_file():
                _remove(out, _files_of_dataset(out, f"{STAGING}/{name}") - (unmoved if name == _COMMITTED else set()))
    kept = re.compile(r".*\.tar|journal\.jsonl" if interrupted else r"(?!)")
    _remove(staging, {name for name in _files(staging) if _OURS.fullmatch(name) and not kept.fullmatch(name)})


def _files(folder: Path) -> set[str]:
    """What a folder and its index hold, relative to the folder; folders end with a slash."""
    found = set()
    for entry in os.scandir(folder):
        if entry.name == INDEX and entry.is_dir(follow_symlinks=False):
            found |= {f"{INDEX}/{name}" for name in os.listdir(entry)}
        elif not entry.name.startswith(".") and entry.name not in _IGNORED:
            found.add(f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name)
    return found


def _files_of_dataset(out: Path, manifest: str = MANIFEST) -> set[str]:
    """The files that a manifest names, or, where it cannot be read, those that are called as ours are."""
    try:
        return read_manifest(out, manifest).files()
    except InputError:
        return {name for name in _files(out) if _OURS.fullmatch(name)}


def _remove(folder: Path, names: set[str]) -> None:
    for name in sorted(names):
        (folder / name).unlink(missing_ok=True)
    _remove_folder(folder / INDEX)


def _remove_folder(folder: Path) -> None:
    """Unless something is in it."""
    try:
        if not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        # The next writer's lock may come in between.
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise
