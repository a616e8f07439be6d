"""Finished blocks of embeddings, kept beside the file that they are for until it is whole: an interrupted command goes on with them."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dnc_dist.base.arrays import Array, read_arrays
from dnc_dist.base.errors import InputError
from dnc_dist.base.files import is_part_of, lock, replacing, write_text
from dnc_dist.base.foreign import read_json
from dnc_dist.embedder import Embedded

_PLAN, _LOCK = "plan.json", ".lock"
_ARRAYS = {"vectors": Array("f", 2), "failed": Array("i", 1), "reasons": Array("U", 1)}


@dataclass(frozen=True)
class Plan:
    """What the blocks are of: the model's fingerprint, a digest of the list of images, how many, and how they are cut."""

    model: str
    images: str
    num_images: int
    block_rows: int
    batch_size: int

    def bounds(self, number: int) -> tuple[int, int]:
        """The images [start, stop) of a block."""
        return number * self.block_rows, min((number + 1) * self.block_rows, self.num_images)

    def digest(self) -> str:
        """A short hash of it."""
        return hashlib.blake2b(repr(self).encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return -(-self.num_images // self.block_rows)


def write_block(path: Path, found: Embedded) -> None:
    """Write a finished block, whole."""
    failed = sorted(found.failed)
    with replacing(path) as file:
        np.savez(
            file,
            vectors=found.vectors,
            failed=np.array(failed, dtype=np.int64),
            reasons=np.array([found.failed[at] for at in failed], dtype=np.str_),
        )


class BlockFolder:
    """The folder of a file that is being written; for one process at a time.

    Raises:
        InputError: another process writes the file, or there is a folder of that name that nobody made for this.
    """

    def __init__(self, out: Path, plan: Plan) -> None:
        self.path, self.plan = out.with_name(f"{out.name}.parts"), plan
        self.note = ""
        """What the user should know of blocks that were there."""
        if self.path.exists() and not self._ours():
            raise InputError(f"{self.path} is in the way, and no `dnc-dist embed` made it; move it away, or choose another --out")
        self.path.mkdir(parents=True, exist_ok=True)
        busy = f"another `dnc-dist embed` is writing into {self.path}; wait for it, stop it, or choose another --out"
        self._lock = lock(self.path / _LOCK, busy)
        if (self.path / _PLAN).is_file() and read_json(self.path / _PLAN, Plan, f"remove {self.path}") != plan:
            self.note = f"{self.path} holds blocks of other images or of another model, which are removed: it begins anew"
            for path in self.path.iterdir():
                if path.name != _LOCK:
                    path.unlink()
        if not (self.path / _PLAN).is_file():
            write_text(self.path / _PLAN, json.dumps(asdict(plan)))

    def _ours(self) -> bool:
        if (self.path / _PLAN).is_file():
            return True
        return self.path.is_dir() and all(path.name == _LOCK or is_part_of(path, _PLAN) for path in self.path.iterdir())

    def file(self, number: int) -> Path:
        """Where a block is. The name has a hash of the plan: a process that another command left over cannot write into this one's."""
        return self.path / f"block-{number:08d}-{self.plan.digest()}.npz"

    def missing(self) -> list[int]:
        """The blocks that are not there yet."""
        return [number for number in range(len(self.plan)) if not self.file(number).is_file()]

    def failed(self, number: int) -> dict[int, str]:
        """The images of a block that could not be read, by their position in the list, and why."""
        arrays = self._arrays(number, ("failed", "reasons"))
        start, stop = self.plan.bounds(number)
        positions = arrays["failed"] + start
        if len(positions) != len(arrays["reasons"]) or not ((positions >= start) & (positions < stop)).all():
            raise self._damaged(number)
        return dict(zip(positions.tolist(), arrays["reasons"].tolist(), strict=True))

    def vectors(self, number: int, dim: int) -> np.ndarray:
        """(n, D) embeddings of the images of a block that could be read."""
        arrays = self._arrays(number, ("vectors", "failed"))
        start, stop = self.plan.bounds(number)
        if arrays["vectors"].shape != (stop - start, dim):
            raise self._damaged(number)
        return np.delete(arrays["vectors"], arrays["failed"], axis=0)

    def _arrays(self, number: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        return read_arrays(self.file(number), {name: _ARRAYS[name] for name in names}, f"remove {self.path}")

    def _damaged(self, number: int) -> InputError:
        return InputError(f"{self.file(number)} is damaged: it holds something else than its block; remove {self.path}")

    def remove(self) -> None:
        """The file is whole: its blocks are not needed any more."""
        self._lock.close()
        shutil.rmtree(self.path)
