"""Data sets on a real web server: what breaks off is taken up again, bounded; what is wrong ends with the address in one message."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.config import load_config
from dnc_dist.data.index import DatasetIndex, open_index
from dnc_dist.data.remote import Download, fetch, knows_ranges
from dnc_dist.data.rows import ShardReader
from dnc_dist.data.segments import read_rows
from dnc_dist.data.stream import SequentialBatches
from dnc_dist.data.transforms import Geometry
from tests.run_fixtures import SIZE, make_dataset
from tests.web_server import Server, serving

BYTES = 300_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    make_dataset(folder, classes=8, per_class=6)
    (folder / "data" / "file").write_bytes(np.random.default_rng(0).bytes(BYTES))
    return folder


@pytest.fixture
def server(place: Path) -> Iterator[Server]:
    with serving(place / "data") as found:
        yield found


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("dnc_dist.data.remote._READ_SECONDS", 1.0)


def content(place: Path) -> bytes:
    return (place / "data" / "file").read_bytes()


def read(server: Server, start: int = 0, stop: int | None = None, patience: float = 5.0) -> bytes:
    with Download(f"{server.url}file", start, stop, size=BYTES, patience=patience) as download:
        return download.read() or b""


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_in_the_middle_and_busy(place: Path, server: Server, ranges: bool) -> None:
    """Cut twice, then 503, then well: the very bytes. With ranges nothing is sent twice, but what was on its way."""
    server.ranges = ranges
    server.fault = lambda name, times: {1: -100_000, 2: -150_000 if not ranges else -50_000, 3: 503}.get(times)
    assert read(server, 1000, 290_000) == content(place)[1000:290_000]
    spans = server.requests("file")
    assert spans[0] == "bytes=1000-289999" and len(spans) == 4
    if ranges:
        assert server.sent == 289_000
        assert spans[1] == "bytes=101000-289999" and spans[2] == spans[3] == "bytes=151000-289999"


def test_slow_is_no_fault(place: Path, server: Server) -> None:
    server.pause = 0.01
    assert read(server, patience=0.1) == content(place)


def test_silent_is_one(place: Path, server: Server) -> None:
    """Nothing for longer than a connection may be silent: it is made again."""
    server.fault = lambda name, times: setattr(server, "pause", 3.0 if times == 1 else 0.0)
    assert read(server) == content(place)
    assert len(server.requests("file")) == 2


def test_busy_for_ever(server: Server) -> None:
    server.fault = lambda name, times: 503
    with pytest.raises(RunError, match=rf"^{server.url}file cannot be read: the server answers 503 \S.*; tried \d+ times in . s") as caught:
        read(server, patience=1.0)
    assert "data.retry_seconds" in str(caught.value)
    assert 3 <= len(server.requests("file")) <= 8  # at longer and longer intervals


def test_nobody_is_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/file"
    with pytest.raises(RunError, match=rf"^{url} cannot be read: ConnectionRefusedError"), Download(url, patience=0.5) as download:
        download.read(1)


def test_wrong_addresses_are_said_at_once(place: Path, server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^{server.url}none: the server answers 404 .*check data\.root"):
        fetch(f"{server.url}none", tmp_path / "none", 10, 5.0)
    with pytest.raises(InputError, match=r"file has more than 10 bytes"):
        fetch(f"{server.url}file", tmp_path / "file", 10, 5.0)
    assert list(tmp_path.glob("*file*")) == []
    with pytest.raises(InputError, match=r"manifest\.json: the server answers 404"):
        open_index(f"{server.url}index")
    server.fault = lambda name, times: 403
    with pytest.raises(InputError, match="the server answers 403"):
        read(server)
    assert len(server.requests("file")) == 2
    server.fault = lambda name, times: None
    with (
        pytest.raises(InputError, match=rf"has {BYTES:,} bytes instead of {BYTES + 1:,}"),
        Download(f"{server.url}file", 5, 9, size=BYTES + 1, patience=5.0) as download,
    ):
        download.read()


def test_a_file_that_is_replaced_meanwhile(place: Path, server: Server) -> None:
    path, before = place / "data" / "file", content(place)

    def fault(name: str, times: int) -> int | None:
        if times == 2:
            path.write_bytes(before[::-1])
        return -100_000 if times == 1 else None

    server.fault = fault
    try:
        with pytest.raises(InputError, match="was changed while it was being read"):
            read(server)
    finally:
        path.write_bytes(before)


def same_rows(remote: DatasetIndex, local: DatasetIndex) -> None:
    """By offset, in a stream, and in a pass in which workers begin inside of shards."""
    rows = local.view("train").rows
    expected = [ShardReader(local).read(int(row)) for row in rows]
    assert [ShardReader(remote).read(int(row)) for row in rows[::7]] == expected[::7]
    assert list(read_rows(remote, rows)) == expected


def test_a_data_set(place: Path, server: Server) -> None:
    """Its index is copied once; rows and passes are those of the folder, with whatever faults."""
    local = open_index(place / "data")
    remote = open_index(server.url)
    assert remote.content_hash == local.content_hash and remote.is_remote
    open_index(server.url)
    assert len(server.requests("manifest.json")) == 2 and len(server.requests("offset.npy")) == 1
    same_rows(remote, local)
    server.fault = lambda name, times: {1: 503, 2: -3000}.get(times % 4) if name.endswith(".tar") else None
    server.ranges = False
    same_rows(remote, local)


@pytest.mark.parametrize("world", [1, 3])
def test_passes(place: Path, server: Server, world: int) -> None:
    def passes(index: DatasetIndex) -> list[torch.Tensor]:
        view, geometry = index.view("test"), Geometry(None, SIZE)
        ranks = [SequentialBatches(index, view, geometry, block_size=5, rank=rank, world=world) for rank in range(world)]
        return [
            torch.cat([block.images for rank in ranks for block in rank]),
            torch.cat([block.places for rank in ranks for block in rank]),
        ]

    for one, other in zip(passes(open_index(server.url)), passes(open_index(place / "data")), strict=True):
        assert torch.equal(one, other)


def test_a_server_without_ranges_is_known(server: Server) -> None:
    assert knows_ranges(f"{server.url}file", 5.0)
    server.ranges = False
    assert not knows_ranges(f"{server.url}file", 5.0)


def test_addresses_in_a_configuration(tmp_path: Path) -> None:
    def config(root: str, *overrides: str) -> object:
        path = tmp_path / "run.yaml"
        path.write_text(f"data: {{root: '{root}'}}\n")
        return load_config(path, overrides).data

    data = config("https://host/sets/sop")
    assert (data.root, data.access) == ("https://host/sets/sop/", "stream")  # type: ignore[attr-defined]
    assert config("https://host/x/", "data.access=indexed").access == "indexed"  # type: ignore[attr-defined]
    local = config("some/folder")
    assert (local.root, local.access) == (Path("some/folder"), "indexed")  # type: ignore[attr-defined]
    for wrong, why in (
        ("https:///x", "names no host"),
        ("http://me:secret@host/x", "no password"),
        ("http://host/x?y=1", r"without \? and #"),
    ):
        with pytest.raises(InputError, match=f"data.root: {'' if 'secret' in wrong else 'must|names'}.*{why}|{why}"):
            config(wrong)
