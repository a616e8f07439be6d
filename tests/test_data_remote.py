"""Data sets on a real web server: what breaks off is taken up again, bounded; what is wrong ends with the address in one message."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.config import load_config
from dnc_dist.data.block_cache import BlockCache
from dnc_dist.data.index import DatasetIndex, open_index
from dnc_dist.data.preflight import stream_notes
from dnc_dist.data.readers import read as read_folder
from dnc_dist.data.remote import Download, Web, fetch, knows_ranges
from dnc_dist.data.rows import ShardReader
from dnc_dist.data.segments import read_rows
from dnc_dist.data.shards import write_shards
from dnc_dist.data.stream import SequentialBatches
from dnc_dist.data.transforms import Geometry
from tests.run_fixtures import SIZE, dnc, draw_folder, make_dataset, start, timeless, wait_until, without_report, write_config
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
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
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
        wait_until(lambda: server.sent >= 289_000)  # counted when the last piece is gone
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


def cached(place: Path, server: Server, tmp_path: Path, most: int = 10**9) -> DatasetIndex:
    return open_index(server.url, Web(5.0, tmp_path / "cache", most))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards of the tests are smaller than one block."""
    monkeypatch.setattr("dnc_dist.data.block_cache.BLOCK", 4096)


@pytest.mark.usefixtures("small_blocks")
def test_a_cache_serves_the_next_epoch_and_the_next_process(place: Path, server: Server, tmp_path: Path) -> None:
    local = open_index(place / "data")
    same_rows(cached(place, server, tmp_path), local)
    sent = server.sent
    blocks = list((tmp_path / "cache").rglob("*.block"))
    assert len(blocks) > 8
    remote = cached(place, server, tmp_path)
    before = len([name for name, _ in server.asked if name.endswith(".tar")])
    same_rows(remote, local)
    assert len([name for name, _ in server.asked if name.endswith(".tar")]) == before
    assert server.sent - sent < 2 * len((place / "data" / "manifest.json").read_bytes())
    # One that a power cut tore is read anew.
    damaged = blocks[0].read_bytes()
    blocks[0].write_bytes(damaged[:-5] + b"wrong")
    same_rows(remote, local)
    assert blocks[0].read_bytes() == damaged
    assert len([name for name, _ in server.asked if name.endswith(".tar")]) == before + 1


@pytest.mark.usefixtures("small_blocks")
def test_a_full_cache_keeps_what_it_has(place: Path, server: Server, tmp_path: Path) -> None:
    local = open_index(place / "data")
    remote = cached(place, server, tmp_path, most=20_000)
    for _ in range(2):
        same_rows(remote, local)
        assert 10_000 < sum(path.stat().st_size for path in (tmp_path / "cache" / "shards").rglob("*.block")) <= 20_000
    assert remote.shards.cache is not None  # type: ignore[union-attr]
    assert remote.shards.cache.recount() <= 20_000  # type: ignore[union-attr]


_FILL = """
import sys
from pathlib import Path
from dnc_dist.data.block_cache import BlockCache
cache, number = BlockCache(Path(sys.argv[1]), 50 * 1016), int(sys.argv[2])
for block in range(40):
    cache.write(cache.path("set", f"shard{block % 4}", (block + number) % 40), bytes([block]) * 1000)
"""


def test_processes_share_a_cache(tmp_path: Path) -> None:
    """Three write the same and other blocks at once: never more than the limit, none torn, and the count is right."""
    here = Path(__file__).parent.parent
    others = [subprocess.Popen([sys.executable, "-c", _FILL, str(tmp_path), str(number)], cwd=here) for number in range(3)]
    assert [other.wait(120) for other in others] == [0] * 3
    cache = BlockCache(tmp_path, 50 * 1016)
    counted = int((tmp_path / "bytes").read_text())
    blocks = list(tmp_path.rglob("*.block"))
    assert len(blocks) == 50 and all(cache.read(path) is not None for path in blocks)
    assert cache.recount() == counted == 50 * 1016
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path not in blocks and path.name != "bytes"]


def put(data: Path, folder: Path) -> None:
    """Have a server's folder hold this data set."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(data, folder)


@pytest.mark.usefixtures("small_blocks")
def test_the_same_images_in_other_shards(tmp_path: Path) -> None:
    """They have the content hash of those that they replace; neither an index nor a block of these is taken for theirs. And back again."""
    folder = draw_folder(tmp_path / "pictures", {f"c{number}": 4 for number in range(8)}, {"t0": 2, "t1": 2})
    for count in (2, 4):
        write_shards(read_folder("folder", folder), tmp_path / str(count), shards=count)
    local = {count: open_index(tmp_path / str(count)) for count in (2, 4)}
    assert local[2].content_hash == local[4].content_hash and len(local[4].manifest.shards) > len(local[2].manifest.shards)
    with serving(tmp_path / "served") as server:
        for count in (2, 4, 2):
            put(tmp_path / str(count), tmp_path / "served")
            same_rows(open_index(server.url, Web(5.0, tmp_path / "cache", 10**9)), local[count])
        again = len(server.asked)
        same_rows(open_index(server.url, Web(5.0, tmp_path / "cache", 10**9)), local[2])
        assert server.asked[again:] == [("manifest.json", None)]


def test_an_index_that_was_copied_while_it_was_being_replaced(place: Path, tmp_path: Path) -> None:
    """It fits to no manifest, which is said; the next start copies it anew."""
    put(place / "data", tmp_path / "served")
    column = tmp_path / "served" / "index" / "label.npy"
    whole = column.read_bytes()
    with serving(tmp_path / "served") as server:
        np.save(column, np.load(column)[:-1])
        with pytest.raises(InputError, match=r"label\.npy is damaged: it has \d+ rows instead of"):
            open_index(server.url)
        column.write_bytes(whole)
        same_rows(open_index(server.url), open_index(place / "data"))


def at_once(act: Callable[[], object]) -> None:
    """Four threads do the same. They stand for machines and containers: their processes may have equal pids, as threads have one."""
    start = Barrier(4)

    def wait_and_act(_: int) -> None:
        start.wait()
        act()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(wait_and_act, range(4)))


def test_machines_that_share_a_home_copy_an_index_at_once(place: Path, server: Server, tmp_path: Path) -> None:
    for number in range(5):
        web = Web(5.0, tmp_path / str(number), 10**9)
        at_once(lambda web=web: open_index(server.url, web))  # type: ignore[misc]
        same_rows(open_index(server.url, web), open_index(place / "data"))


def test_machines_that_share_a_cache_keep_a_block_at_once(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 10**6)
    cache.recount()
    for number in range(20):
        at_once(lambda number=number: cache.write(cache.path("set", "shard", number), bytes(10_000)))  # type: ignore[misc]
        assert cache.read(cache.path("set", "shard", number)) == bytes(10_000)
    assert {path.suffix for path in (tmp_path / "set" / "shard").iterdir()} == {".block"}
    assert cache.recount() == 20 * 10_016


def test_before_anything_starts(place: Path, server: Server) -> None:
    """Eight shards of eight classes: too few for 3 ranks with 4 workers, said with the number; refused where a server knows no ranges."""
    index = open_index(server.url)
    view = index.view("train")
    assert list(stream_notes(index, view, lanes=64, world=2, workers=4)) == []
    (note,) = stream_notes(index, view, lanes=64, world=3, workers=4)
    assert (
        note.startswith("train: 8 shards are fewer than 12 readers (ranks x workers)")
        and "use fewer ranks or data.workers, 8 together" in note
    )
    (note,) = stream_notes(index, view, lanes=4, world=2, workers=4)
    assert note.startswith("data.lanes=4 keeps 2 of the 4 workers of a rank busy; data.lanes=8 keeps all")
    with pytest.raises(InputError, match=r"data\.lanes=2 is less than one for each of 3 ranks"):
        list(stream_notes(index, view, lanes=2, world=3, workers=0))
    server.ranges = False
    with pytest.raises(InputError, match=r"train-000000\.tar sends whole files only \(no range requests\)"):
        list(stream_notes(index, view, lanes=64, world=3, workers=4))


def test_more_shards_on_request(tmp_path: Path) -> None:
    """`data prepare --shards` takes the number that the message asks for."""
    folder = draw_folder(tmp_path / "pictures", {f"c{number:02d}": 2 for number in range(20)}, {"t0": 2, "t1": 2})
    write_shards(read_folder("folder", folder), tmp_path / "data", shards=10)
    index = open_index(tmp_path / "data")
    view = index.view("train")
    assert len(np.unique(view.shards)) == 10
    (note,) = stream_notes(index, view, lanes=64, world=4, workers=3)
    assert note.endswith("some begin inside of a shard; prepare the data set with `--shards 12` or more")
    with pytest.raises(InputError, match="already holds another prepared data set"):
        write_shards(read_folder("folder", folder), tmp_path / "data", shards=12)


@pytest.mark.slow
def test_a_run_from_a_server(place: Path, server: Server, tmp_path: Path) -> None:
    """With faults it trains to the very curve of the folder's; then a server that dies under it (exit 1)."""
    options = {"workers": 0, "lanes": 4, "pool_mb": 1.0, "access": "stream"}
    env = {"XDG_CACHE_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    for name, root in (("local", str(place / "data")), ("remote", server.url)):
        write_config(
            tmp_path,
            Path(root),
            name,
            data=options | {"root": root},
            schedule={"epochs": 2},
            division={"num_learners": 2, "conquer_from": None},
        )
    server.fault = lambda name, times: {1: 503, 3: -3000}.get(times % 7) if name.endswith(".tar") else None
    ends = [start(["train", f"{name}.yaml"], tmp_path, env=env, before=without_report).wait() for name in ("local", "remote")]
    assert ends[1].result | {"run": ""} == ends[0].result | {"run": ""}
    assert timeless(tmp_path / "runs" / "remote") == timeless(tmp_path / "runs" / "local")

    # Commands after the training read the same address; a copy on this machine is read instead of it.
    last = json.loads(dnc("evaluate", "runs/local", "--json", folder=tmp_path, env=env).out)
    server.fault = lambda name, times: None
    assert json.loads(dnc("evaluate", "runs/remote", "--json", folder=tmp_path, env=env).out) | {"run": ""} == last | {"run": ""}
    for command in (["report", "runs/remote"], ["export", "runs/remote", "--out", "exported"], ["doctor", "data", "remote.yaml"]):
        done = dnc(*command, folder=tmp_path, env=env)
        assert done.code == 0, done
    card = (tmp_path / "exported" / "README.md").read_text()
    assert server.url.removeprefix("http://").rstrip("/") in card
    server.asked.clear()
    copied = start(["train", "remote.yaml", "--set", "run.name=copied"], tmp_path, env=env | {"DNC_LOCAL_DATA": str(place / "data")})
    assert copied.wait().result | {"run": ""} == ends[0].result | {"run": ""}
    assert not [name for name, _ in server.asked if name.endswith(".tar")]

    server.fault = lambda name, times: 503 if name.startswith("test") else None
    again = ["train", "remote.yaml", "--set", "run.name=dies", "--set", "data.retry_seconds=1", "--set", "data.workers=1"]
    done = start(again, tmp_path, env=env, before=without_report).wait()
    assert done.code == 1 and "Traceback" not in done.err
    assert f"{server.url}test-00000" in done.err and "cannot be read: the server answers 503" in done.err


def test_an_address_without_data(server: Server, tmp_path: Path) -> None:
    write_config(tmp_path, Path("x"), data={"root": f"{server.url}elsewhere"})
    error = dnc("train", "run.yaml", folder=tmp_path, env={"XDG_CACHE_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}).error
    assert error.startswith(f"{server.url}elsewhere/manifest.json: the server answers 404")
    assert not (tmp_path / "runs").exists()


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
