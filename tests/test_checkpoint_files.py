"""What the machine cannot read is not damaged: no checkpoint is passed over or removed because a disk or a network fails for a moment."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dnc_dist.base import foreign
from dnc_dist.base.errors import InputError
from dnc_dist.rundir.checkpoints import Checkpoints, crc32, tag_of, temporary


def publish(checkpoints: Checkpoints, step: int, *, best: bool = False) -> str:
    tag = tag_of(step)
    checkpoints.make_room(tag)
    folder = checkpoints.folder / temporary(tag)
    folder.mkdir()
    (folder / "weights.pt").write_text(f"weights of step {step}")
    size = (folder / "weights.pt").stat().st_size
    checkpoints.publish(tag, {"weights.pt": (size, crc32(folder / "weights.pt"))}, best=best)
    return tag


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Files whose path ends like this can be opened no more."""
    original = foreign._open_regular

    def fail(ending: str) -> None:
        def open_regular(path: Path) -> object:
            if str(path).endswith(ending):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return original(path)

        monkeypatch.setattr(foreign, "_open_regular", open_regular)

    return fail


def test_the_best_checkpoint_stays_when_its_pointer_cannot_be_read(tmp_path: Path, failing: Callable[[str], None]) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    best, newer = publish(checkpoints, 6, best=True), publish(checkpoints, 12)
    failing("best")
    with pytest.raises(OSError, match="Stale"):
        publish(checkpoints, 20)
    assert checkpoints.tags() == [best, newer]
    assert (checkpoints.folder / "latest").read_text().strip() == newer
    with pytest.raises(OSError, match="Stale"):
        checkpoints.choose("best")


def test_a_checkpoint_that_cannot_be_read_is_not_passed_over(tmp_path: Path, failing: Callable[[str], None]) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    old, new = publish(checkpoints, 6), publish(checkpoints, 12)
    failing(f"{new}/files.json")
    with pytest.raises(OSError, match="Stale"):
        checkpoints.find()
    assert checkpoints.tags() == [old, new]


def test_a_list_of_files_that_is_missing_or_no_list_is_damage(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    old, new = publish(checkpoints, 6), publish(checkpoints, 12)
    (checkpoints.folder / new / "files.json").unlink()
    tag, messages = checkpoints.find() or ("", [])
    assert tag == old and "files.json cannot be read (No such file or directory)" in messages[0]
    (checkpoints.folder / old / "files.json").write_text(json.dumps([1]))
    with pytest.raises(InputError, match="no usable checkpoint"):
        checkpoints.find()
