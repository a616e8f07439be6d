"""Files that are written whole or not at all, on disks that are full, folders that cannot be written, and where links stand."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier

import pytest

from dnc_dist.base.errors import InputError, RunError, explain
from dnc_dist.base.files import is_part_of, lock, replacing, write_text


@contextmanager
def full(most: int) -> Iterator[None]:
    """No file gets longer than this, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_text(path, "old")
    with full(1 << 10), pytest.raises(OSError, match="File too large") as caught:
        write_text(path, "new" * 1000)
    said = explain(caught.value)
    assert isinstance(said, RunError) and str(said).startswith(f"{path}: File too large; raise the limit")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["page.html"]


def test_a_folder_that_is_not_there_is_said_with_the_files_own_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_text(tmp_path / "gone" / "page.html", "new")
    said = explain(caught.value)
    assert isinstance(said, InputError) and str(said).startswith(f"{tmp_path / 'gone' / 'page.html'}: No such file or directory; check")


def test_an_error_of_the_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as file:
        file.write(b"half")
        assert is_part_of(Path(file.name), "a")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "ours").symlink_to(tmp_path / "theirs")
    write_text(tmp_path / "ours", "ours")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert (tmp_path / "ours").read_text() == "ours" and not (tmp_path / "ours").is_symlink()


def test_a_new_file_has_the_users_default_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("code", "of_folders", "passes"), [(errno.EINVAL, True, True), (errno.EINVAL, False, False), (errno.EIO, True, False)]
)
def test_a_file_system_that_cannot_sync_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, of_folders: bool, passes: bool
) -> None:
    """Network file systems refuse it for folders; a file whose bytes cannot be forced to the disk is an error."""
    fsync = os.fsync

    def refusing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folders:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    if passes:
        write_text(tmp_path / "a", "new")
        assert (tmp_path / "a").read_text() == "new"
    else:
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            write_text(tmp_path / "a", "new")
        assert caught.value.filename == str(tmp_path / "a")


def test_a_locked_file_is_busy_for_another_process(tmp_path: Path) -> None:
    held = lock(tmp_path / ".lock", "busy here")
    code = "import sys; from pathlib import Path; from dnc_dist.base.files import lock; lock(Path(sys.argv[1]), 'somebody has it')"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    busy = subprocess.run(command, capture_output=True, text=True, check=False)
    assert busy.returncode != 0 and "InputError: somebody has it" in busy.stderr
    held.close()
    assert subprocess.run(command, check=False).returncode == 0


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def without_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", without_locks)
    with lock(tmp_path / ".lock", "busy"):
        assert "this file system has no locks" in caplog.text


def test_many_write_the_same_file_at_once(tmp_path: Path) -> None:
    """Threads stand for machines and containers, whose processes may have equal pids: all succeed, and one of them stays."""
    start = Barrier(4)

    def write(number: int) -> None:
        for durable in (True, False) * 20:
            start.wait()
            with replacing(tmp_path / "a", durable=durable) as file:
                file.write(bytes([number]) * 1000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    content = (tmp_path / "a").read_bytes()
    assert len(content) == 1000 and len(set(content)) == 1 and os.listdir(tmp_path) == ["a"]


def test_a_private_file_is_private_from_the_beginning(tmp_path: Path) -> None:
    with replacing(tmp_path / "a", mode=0o600) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
