"""The folder of a data set: one writer at a time, nothing foreign removed, never half a data set, one message for a full disk."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.data import place
from dnc_dist.data.index import open_index
from dnc_dist.data.manifest import MANIFEST, STAGING
from dnc_dist.data.readers import Reading, Sample, read
from dnc_dist.data.shards import write_shards
from tests.mounts import in_own_mounts, mount
from tests.process_server import SERVER
from tests.run_fixtures import dnc, draw_folder, with_small_files


def reading(marks: int = 0) -> Reading:
    """Four training images and two for testing; the content depends on ``marks``."""
    from tests.test_data_prepare import jpeg

    classes = {"a": "train", "b": "train", f"c{marks}": "test"}
    return Reading("list", [Sample(name, split, f"{name}/{at}", data=jpeg(9 * at)) for name, split in classes.items() for at in (0, 1)], {})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_comes_into_the_folder_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def put(done: int, total: int) -> None:
        (out / "mine.txt").write_text("mine")

    with pytest.raises(InputError, match=r"other files \('mine.txt'\), which stay"):
        write_shards(reading(), out, progress=put)
    assert names(out) == ["mine.txt"]
    (out / "mine.txt").unlink()
    assert write_shards(reading(), out)
    old = open_index(out).content_hash
    with pytest.raises(InputError, match=r"mine\.txt"):
        write_shards(reading(1), out, progress=put, force=True)
    assert open_index(out).content_hash == old and (out / "mine.txt").read_text() == "mine"
    assert not (out / STAGING).exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_file_of_our_name_that_comes_at_the_last_moment_stays(tmp_path: Path, force: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the files are forced to the disk, which may take minutes."""
    out = tmp_path / "out"
    sync, mine = place.sync, out / "train-000000.tar"
    if force:
        assert write_shards(reading(), out)
        mine = out / "train-999999.tar"

    def late(path: Path) -> None:
        mine.write_text("mine")
        sync(path)

    monkeypatch.setattr(place, "sync", late)
    with pytest.raises(InputError, match=r"other files \('train-"):
        write_shards(reading(1), out, force=force)
    assert mine.read_text() == "mine"
    assert not force or open_index(out)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert write_shards(reading(), tmp_path / "out")
    assert open_index(tmp_path / "out")


@pytest.mark.parametrize("name", ["index/mine.npy", "mine/", "train-000900.tar"])
def test_force_removes_only_what_the_manifest_names(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    write_shards(reading(), out)
    before = names(out)
    (out / name).mkdir() if name.endswith("/") else (out / name).write_text("mine")
    with pytest.raises(InputError, match="other files") as caught:
        write_shards(reading(1), out, force=True)
    assert name in str(caught.value)
    assert (out / name).exists() and set(before) <= set(names(out))


def test_hidden_files_and_what_we_drew_are_in_nobodys_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".keep").write_text("mine")
    (out / "lost+found").mkdir()
    assert write_shards(reading(), out)
    (out / "contact_sheet.png").write_bytes(b"x")
    assert write_shards(reading(1), out, force=True)
    assert open_index(out).class_names == ["a", "b", "c1"]
    assert (out / ".keep").read_text() == "mine" and not (out / "contact_sheet.png").exists()


def test_a_damaged_data_set_can_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_shards(reading(), out)
    (out / MANIFEST).write_text("{")
    with pytest.raises(InputError, match=r"damaged.*--force"):
        write_shards(reading(1), out)
    assert write_shards(reading(1), out, force=True)
    assert open_index(out).class_names == ["a", "b", "c1"]


def test_the_second_writer_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write_too(done: int, total: int) -> None:
        with pytest.raises(InputError, match=r"another .* is writing into"):
            write_shards(reading(1), out, force=True)

    assert write_shards(reading(), out, progress=write_too)
    assert open_index(out).class_names == ["a", "b", "c0"]


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="no folder"):
        write_shards(reading(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


class _Killed(BaseException):
    """Stands for SIGKILL: from the one call on that raises it, nothing is done to the file system."""


def _kill_at(count: int, patch: pytest.MonkeyPatch, kill: Callable[[], None]) -> None:
    """From the ``count``-th change of the file system on, ``kill`` is called instead."""
    left = [count]

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0:
                kill()
            return function(*args, **kwargs)

        return counted

    for name in ("rename", "unlink", "rmdir"):
        patch.setattr(os, name, counting(getattr(os, name)))
    patch.setattr(place, "sync", counting(lambda path: None))


def _die() -> None:
    raise _Killed


@pytest.mark.parametrize("old", [True, False])
def test_killed_at_any_moment(tmp_path: Path, old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "sync", lambda path: None)  # that nothing is lost with the power cannot be seen here, and takes long
    seen = set()
    count, killed = 0, True
    lock = place._lock
    while killed:
        count += 1
        out = tmp_path / f"out{count}"
        if old:
            write_shards(reading(), out)
        locks: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, "_lock", lambda out: locks.append(lock(out)) or locks[0])  # noqa: B023
            _kill_at(count, patch, _die)
            try:
                write_shards(reading(1), out, force=True)
                killed = False
            except _Killed:
                os.close(locks[0])  # as the kernel does
        try:
            seen.add(tuple(open_index(out).class_names))
        except InputError as error:
            assert "holds no prepared data set" in str(error)
            seen.add(())
        assert write_shards(reading(2), out, force=True)  # what was left is no obstacle, and goes
        assert open_index(out).class_names == ["a", "b", "c2"]
        shards = ["test-000000.tar", "train-000000.tar", "train-000001.tar"]
        assert names(out) == ["classes.json", "duplicates.json", "index", "manifest.json", *shards]
    assert seen == {("a", "b", "c1"), (), *([("a", "b", "c0")] if old else [])}
    assert count > 20


def _prepare_and_end(out: Path) -> None:
    _kill_at(8, pytest.MonkeyPatch(), lambda: os.kill(os.getpid(), signal.SIGKILL))
    write_shards(reading(1), out)


def test_a_dead_writer_holds_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = SERVER.Process(target=_prepare_and_end, args=(out,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and (out / STAGING).exists()
    with pytest.raises(InputError, match=r"holds no prepared data set .* under way or was interrupted"):
        open_index(out)
    assert write_shards(reading(), out) and open_index(out).class_names == ["a", "b", "c0"]
    assert not (out / STAGING).exists()


def _prepare_on(kind: str, sources: Path, out: Path) -> None:
    mount(out, {"small": "size=64k", "read-only": "ro,size=4m"}.get(kind, "size=4m"))
    if kind == "whole":
        assert write_shards(read("folder", sources), out) and open_index(out).splits == ["train", "test"]
        return
    with pytest.raises((InputError, RunError), match=r"--out .* cannot be written: .*(No space left|Read-only)"):
        write_shards(read("folder", sources), out)
    assert not any(out.iterdir())


@pytest.mark.parametrize("kind", ["whole", "small", "read-only"])
def test_mount_points(tmp_path: Path, kind: str) -> None:
    sources = draw_folder(tmp_path / "src", {f"a{number}": 9 for number in range(9)}, {"b": 9})
    (tmp_path / "out").mkdir()
    in_own_mounts(_prepare_on, kind, sources, tmp_path / "out")


def test_full_disk_is_one_message(tmp_path: Path) -> None:
    draw_folder(tmp_path / "src", {"a": 30, "b": 2}, {"c": 2})
    arguments = ("data", "prepare", "folder", "--root", "src", "--out", "out")
    done = dnc(*arguments, folder=tmp_path, before=_with_files_of_16_kb)
    last = done.err.splitlines()[-1]
    assert done.code == 1 and "--out" in last and "cannot be written: File too large" in last and "free some space" in last
    assert not (tmp_path / "out").exists()
    assert dnc(*arguments, folder=tmp_path).code == 0


def _with_files_of_16_kb() -> None:
    with_small_files(1 << 14)
