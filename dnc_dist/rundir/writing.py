"""How checkpoints are written: while training waits for them, or in the background.

In the background, training waits until every rank has copied its state. Then a thread of each rank writes the files of this rank, forces
them to disk, and leaves a note with their sizes and checksums. When the notes of all ranks are there, the thread of rank 0 publishes. A
rank that ends before leaves no note, so nothing is published. No thread calls a collective: it would meet those of training.

The notes are in the store through which the ranks found each other, not in the run directory. On a network file system another machine
may list an old folder for a minute, but the store has no cache. It holds nothing of an earlier attempt, either, as it ends with the
processes. Rank 0 takes names, sizes and checksums from the notes and does not read the files of others; and each rank forces its own
files to disk, which only the machine that wrote them can do.

One checkpoint at most is in flight: whatever is saved next waits for it first. So checkpoints are published in order, and there is one copy
of the state. The ranks learn of a failed write by ``failed``, which training sums over them in every step, and at the latest by ``finish``.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch.distributed import DistError

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.base.files import sync
from dnc_dist.processes import distributed, watchdog
from dnc_dist.processes.transfer import Snapshot
from dnc_dist.rundir.checkpoints import Checkpoints, crc32, tag_of, temporary

# How often rank 0 looks for notes.
_TICK_SECONDS = 0.05
# How long it still does when the run ends with an error, and the others may be gone.
_LAST_SECONDS = 5.0
Write = Callable[[], Sequence[Path]]


class Note(NamedTuple):
    """What a rank says of its files: size and checksum by name, or why they cannot be written."""

    files: dict[str, tuple[int, int]]
    problem: str


@dataclass
class _Job:
    """A checkpoint that is being written; ``number`` counts those of this process."""

    number: int
    tag: str
    best: bool
    thread: threading.Thread | None = None
    written: threading.Event = field(default_factory=threading.Event)
    note: Note | None = None
    published: bool = False
    error: Exception | None = None


class CheckpointWriter:
    """Writes the checkpoints of a run on this rank.

    Args:
        checkpoints: of the run.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._snapshot = Snapshot()
        self._job: _Job | None = None
        self._started = 0
        self._last = math.inf
        self._store = distributed.store("written") if distributed.world_size() > 1 else None

    def save(
        self, step: int, prepare: Callable[[Path, str, Snapshot | None], Write], *, best: bool = False, background: bool = False
    ) -> Path:
        """Collective. Write a checkpoint, after the one in flight.

        Args:
            step: optimizer updates done, which name it.
            prepare: collective; takes what this rank writes into the folder of this name below that one, as a copy if it is given a
                snapshot. Its result writes the files and returns their paths.
            best: whether it is the best so far.
            background: return as soon as the state is copied.

        Returns:
            Its folder.

        Raises:
            RunError: it cannot be written, or the one in flight cannot; the checkpoints before it are untouched.
        """
        self.finish()
        tag = tag_of(step)
        watchdog.phase(f"checkpoint of step {step}")
        if distributed.is_main():
            self.checkpoints.make_room(tag)
        distributed.barrier()
        try:
            write = prepare(self.checkpoints.folder, temporary(tag), self._snapshot if background else None)
        except (OSError, RuntimeError) as error:
            if (explained := self.checkpoints.unwritable(tag, error)) is error:
                raise
            raise explained from error
        self._started += 1
        job = self._job = _Job(self._started, tag, best)
        if background:
            job.thread = threading.Thread(target=self._in_background, args=(job, write), daemon=True, name=f"checkpoint {tag}")
            job.thread.start()
        else:
            self._write(job, write)
            self.finish()
        return self.checkpoints.folder / tag

    @property
    def failed(self) -> bool:
        """Whether the checkpoint in flight cannot be written, as far as this rank knows."""
        return self._job is not None and self._job.error is not None

    def finish(self) -> None:
        """Collective. Wait until the checkpoint in flight, if there is one, is published.

        Raises:
            RunError: it cannot be written.
        """
        if (job := self._job) is None:
            return
        watchdog.phase(f"checkpoint {job.tag} in flight")
        job.written.wait()
        # A rank that still writes does not wait in a collective as the others do: so the watchdog names the right one.
        notes: list[Note] = distributed.gather_objects(job.note)
        if job.thread is not None:
            job.thread.join()
        if distributed.is_main() and not job.published and job.error is None:
            self._publish(job, notes)
        problem = _problem(notes) or distributed.broadcast_object(_text(job.error))
        self._job = None
        if job.error is not None and not isinstance(job.error, RunError):
            raise job.error  # nothing that the disk did
        if problem:
            raise RunError(problem) from job.error

    def close(self) -> None:
        """Wait for the write in flight, without the other ranks: there is one only after an error, and they may have ended.

        Raises:
            RunError: it failed.
        """
        if (job := self._job) is None or job.thread is None:
            return
        self._last = time.monotonic() + _LAST_SECONDS
        job.written.wait()
        # Longer only if the store does not answer, which one process does without.
        job.thread.join(None if self._store is None else 2 * _LAST_SECONDS)
        if job.error is not None:
            raise job.error

    def _write(self, job: _Job, write: Write) -> None:
        """Have the files of this rank on the disk."""
        try:
            files = {}
            for path in write():
                sync(path)
                files[path.name] = (path.stat().st_size, crc32(path))
            job.note = Note(files, "")
        except Exception as error:
            job.error = self.checkpoints.unwritable(job.tag, error)
            job.note = Note({}, _text(job.error))
        finally:
            job.written.set()

    def _in_background(self, job: _Job, write: Write) -> None:
        self._write(job, write)
        try:
            if self._store is not None:
                self._store.set(f"{job.number}/{distributed.rank()}", json.dumps(job.note))
            if distributed.is_main() and (notes := self._notes(job)):
                self._publish(job, notes)
        except DistError:
            # The process that held the store has ended. The main thread will see what that means.
            return
        except InputError as error:
            job.error = error

    def _notes(self, job: _Job) -> list[Note]:
        """Those of all ranks, once they are there; none if the run ends before."""
        if self._store is None:
            assert job.note is not None
            return [job.note]
        keys = [f"{job.number}/{rank}" for rank in range(distributed.world_size())]
        while not self._store.check(keys):
            if time.monotonic() > self._last:
                return []
            time.sleep(_TICK_SECONDS)
        notes = [watchdog.read(text, Note) for text in self._store.multi_get(keys)]
        for key in keys:
            self._store.delete_key(key)
        return notes

    def _publish(self, job: _Job, notes: Sequence[Note]) -> None:
        """Publish a checkpoint if every rank could write its files; on rank 0."""
        if problem := _problem(notes):
            job.error = job.error or RunError(problem)
            return
        try:
            self.checkpoints.publish(job.tag, {name: entry for note in notes for name, entry in note.files.items()}, best=job.best)
            job.published = True
        except Exception as error:
            job.error = self.checkpoints.unwritable(job.tag, error)


def _problem(notes: Sequence[Note]) -> str:
    """Why a rank could not write its files; "": all could."""
    return next((note.problem for note in notes if note.problem), "")


def _text(error: Exception | None) -> str:
    """What the other ranks are told; "" without an error."""
    return str(error) if isinstance(error, RunError) else f"rank {distributed.rank()}: {error!r}" if error is not None else ""
