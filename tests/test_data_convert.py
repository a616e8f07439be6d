"""Preparing at real size: several processes write the same bytes, and what was interrupted goes on to the same bytes."""

from __future__ import annotations

import errno
import io
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image, JpegImagePlugin

from dnc_dist.base import foreign
from dnc_dist.base.errors import InputError, RunError
from dnc_dist.data import convert
from dnc_dist.data.images import Form, normalise
from dnc_dist.data.index import open_index
from dnc_dist.data.journal import Journal
from dnc_dist.data.manifest import JOURNAL, STAGING
from dnc_dist.data.readers import Reading, Sample
from dnc_dist.data.shards import write_shards
from tests.process_server import SERVER
from tests.run_fixtures import wait_until
from tests.test_data_prepare import files_of

FORM = Form(max_side=24, quality=80, subsampling="4:2:0")


def picture(seed: int, size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **{"format": "JPEG", **options})  # type: ignore[arg-type]
    return buffer.getvalue()


def reading(classes: int = 8) -> Reading:
    """Classes of five images, one of them broken; one class has no image that can be read, so that its shard is never kept."""
    samples = []
    for name in range(classes):
        for at in range(5):
            data = b"broken" if at == 3 or name == 2 else picture(100 * name + at)
            samples.append(Sample(f"c{name}", "test" if name > classes - 3 else "train", f"c{name}/{at}", data=data))
    return Reading("list", samples, {})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert write_shards(reading(), out, form=FORM)
    assert len(open_index(out).shard_paths) == 7 and len(open_index(out).manifest.unreadable) == 12
    return files_of(out)


def test_the_bytes_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "_WORTH", 2)
    done: list[tuple[int, int]] = []
    assert write_shards(reading(), tmp_path / "out", form=FORM, processes=3, progress=lambda *told: done.append(told))
    assert files_of(tmp_path / "out") == undisturbed
    assert done == [(count, 40) for count in range(1, 41)]


@pytest.mark.parametrize(("subsampling", "sampling"), [("4:4:4", 0), ("4:2:0", 2)])
def test_the_form_of_what_is_encoded_anew(subsampling: str, sampling: int) -> None:
    data = picture(1, (80, 60))
    small = normalise(data, Form(24, 80, subsampling))  # type: ignore[arg-type]
    with Image.open(io.BytesIO(small)) as image:
        assert image.size == (24, 18) and JpegImagePlugin.get_sampling(image) == sampling
    assert len(normalise(data, Form(24, 30, subsampling))) < len(small)  # type: ignore[arg-type]
    assert normalise(data, Form(80, 30, subsampling)) == normalise(data)  # type: ignore[arg-type]  # not larger: as it is


def _killed_after(count: int, out: Path) -> None:
    add = Journal.add

    def adding(self: Journal, path: Path | None, images: list[tuple[int, int] | str]) -> None:
        add(self, path, images)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    left = [count]
    Journal.add = adding  # type: ignore[method-assign]
    write_shards(reading(), out, form=FORM)


def kill_after(count: int, out: Path) -> None:
    """Have a writer killed when so many shards are finished."""
    process = SERVER.Process(target=_killed_after, args=(count, out))
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL and (out / STAGING / JOURNAL).exists()


def go_on(out: Path) -> tuple[int, list[str]]:
    """Write again; how many images were converted, and what was said."""
    converted: list[int] = []
    said: list[str] = []
    assert write_shards(reading(), out, form=FORM, progress=lambda done, total: converted.append(done), say=said.append)
    assert not (out / STAGING).exists()
    return len(converted), said


@pytest.mark.parametrize("count", [1, 3, 8])
def test_after_a_kill_the_same_command_goes_on(count: int, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    kill_after(count, out)
    assert go_on(out) == (40 - 5 * count, [f"{5 * count} of 40 images were written before; going on with the others"])
    assert files_of(out) == undisturbed


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new, 1))


DAMAGES: dict[str, tuple[Callable[[Path], object], int]] = {
    "a shard is cut": (lambda staging: os.truncate(staging / "train-000001.tar", 1024), 1),
    "a shard is gone": (lambda staging: (staging / "train-000000.tar").unlink(), 0),
    "the last line is cut": (lambda staging: os.truncate(staging / JOURNAL, (staging / JOURNAL).stat().st_size - 5), 3),
    "a line means nothing": (lambda staging: rewrite(staging / JOURNAL, b'"shard"', b'"sh"'), 0),
    "no journal": (lambda staging: (staging / JOURNAL).unlink(), 0),
    "another data set": (lambda staging: (staging / JOURNAL).write_text('{"fingerprint": "0"}\n'), 0),
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_only_whole_shards_are_taken_over(name: str, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    damage, whole = DAMAGES[name]
    out = tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done == 21:  # four shards are finished
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(reading(), out, form=FORM, progress=stop)
    with pytest.raises(InputError, match="interrupted; the same command goes on"):
        open_index(out)
    damage(out / STAGING)
    assert go_on(out)[0] == 40 - 5 * whole
    assert files_of(out) == undisturbed


def test_another_data_set_begins_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill_after(3, out)
    converted: list[int] = []
    assert write_shards(reading(), out, form=Form(max_side=20), progress=lambda done, total: converted.append(done))
    assert len(converted) == 40 and not (out / STAGING).exists()


def _write_slowly(out: Path) -> None:
    convert._WORTH = 1
    write_shards(reading(400), out, form=FORM, processes=2)


def test_nothing_goes_on_when_the_writer_is_killed(tmp_path: Path) -> None:
    process = SERVER.Process(target=_write_slowly, args=(tmp_path / "out",))
    process.start()
    journal = tmp_path / "out" / STAGING / JOURNAL
    wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 1)
    assert process.pid is not None
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.join()
    wait_until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children), 30)


def test_a_killed_process_is_told_and_nothing_lost(tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def kill_one(done: int, total: int) -> None:
        if done == 21:
            for child in psutil.Process().children():
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()

    with monkeypatch.context() as patch:
        patch.setattr(convert, "_WORTH", 2)
        patch.setattr(convert, "_CHUNK", 1)
        with pytest.raises(RunError, match="was killed, perhaps as memory ran out; the same command goes on; give it fewer --processes"):
            write_shards(reading(), out, form=FORM, processes=2, progress=kill_one)
    assert go_on(out)[0] <= 20
    assert files_of(out) == undisturbed


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_no_image_is_left_out_because_the_machine_fails(
    number: int, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command goes on, to the same bytes."""
    samples = []
    for at, sample in enumerate(reading().samples):
        assert sample.data is not None
        (path := tmp_path / f"{at}.jpg").write_bytes(sample.data)
        samples.append(replace(sample, data=None, path=path))
    original = foreign._open_regular

    def failing(path: Path) -> object:
        if path == samples[-1].path:
            raise OSError(number, os.strerror(number), str(path))
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(foreign, "_open_regular", failing)
        with pytest.raises(RunError, match=os.strerror(number)):
            write_shards(Reading("list", samples, {}), tmp_path / "out", form=FORM)
    assert list((tmp_path / "out" / STAGING).glob("*.tar"))
    assert write_shards(Reading("list", samples, {}), tmp_path / "out", form=FORM)
    shards = {name: data for name, data in undisturbed.items() if name.endswith(".tar")}
    assert shards.items() <= files_of(tmp_path / "out").items()
