"""Batches come from loader workers although /dev/shm is too small or files are few; a worker's message arrives as it was."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dnc_dist.base.errors import InputError
from dnc_dist.data import transport
from dnc_dist.data.batching import epoch_schedule
from dnc_dist.data.index import open_index
from dnc_dist.data.loading import Batch
from dnc_dist.data.readers import Reading, Sample
from dnc_dist.data.shards import write_shards
from dnc_dist.data.stream import SequentialBatches, TrainBatches
from dnc_dist.data.transforms import Geometry
from tests.mounts import in_own_mounts, mount
from tests.test_data_prepare import jpeg

ROOT = Path(__file__).resolve().parent.parent
SIZE = 224


def batch() -> Batch:
    """2.4 MB of pixels."""
    ones = torch.arange(16)
    images = torch.arange(16 * 3 * SIZE * SIZE).remainder(251).to(torch.uint8).reshape(16, 3, SIZE, SIZE)
    return Batch(images, ones, ones - 1, ones + 2, ones, ones > 3, ["a"], 7, [16])


def _on_small_shared_memory() -> None:
    mount("/dev/shm", "size=4m")
    transport.get_worker_info = lambda: True  # type: ignore[assignment, return-value]
    transport._log.disabled = True
    first, second = (transport._pack(batch()) for _ in range(2))
    assert isinstance(first, transport._Packed) and isinstance(second, transport._Packed)
    assert isinstance(first.images, torch.Tensor) and isinstance(second.images, np.ndarray)  # one fits, two do not
    for packed in (first, second):
        for one, other in zip(transport._unpack(packed), batch(), strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_what_does_not_fit_into_shared_memory_goes_through_the_pipe() -> None:
    in_own_mounts(_on_small_shared_memory)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [Sample(f"c{name}", "train", f"c{name}/{at}", data=jpeg(20 * name + at)) for name in range(4) for at in range(8)]
    out = tmp_path_factory.mktemp("transport") / "out"
    write_shards(Reading("list", samples, {}), out)
    return out


def test_the_message_of_a_worker_is_the_message(root: Path) -> None:
    index = open_index(root)
    loader = SequentialBatches(index, index.view("train"), Geometry(None, 8), block_size=4, workers=1)
    shard = index.shard_paths[0]
    data = shard.read_bytes()
    shard.write_bytes(b"x" * len(data))
    try:
        with pytest.raises(InputError, match=r"^\S*train-000000\.tar cannot be read as a tar file") as caught:
            list(loader)
    finally:
        shard.write_bytes(data)
    assert "\n" not in str(caught.value)


def load(root: Path) -> None:
    """One epoch with two workers, as the slow tests start it in another process."""
    index = open_index(root)
    view = index.view("train")
    schedule = epoch_schedule(np.zeros(len(view), int), view.labels, seed=0, epoch=0, batch_size=16, samples_per_class=4)
    sums = []
    for workers in (0, 2):
        loader = TrainBatches(index, view, Geometry("standard", SIZE), seed=0, workers=workers)
        sums.append([int(batch.images.sum()) for _ in range(3) for batch in loader.epoch(schedule, first_step=0)])
        loader.close()
    assert sums[0] == sums[1]
    print("loaded")


def _python(root: Path, *before: str) -> subprocess.CompletedProcess[str]:
    code = f"from pathlib import Path; from tests.test_data_transport import load; load(Path({str(root)!r}))"
    return subprocess.run(
        [*before, sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_an_epoch_with_docker_like_shared_memory(root: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("a process may not have mounts of its own here")
    done = _python(root, "unshare", "-m", "bash", "-c", 'mount -t tmpfs -o size=3m tmpfs /dev/shm && exec "$0" "$@"')
    assert done.returncode == 0 and done.stdout == "loaded\n", done
    assert done.stderr.count("/dev/shm has no room for batches") == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_epoch_with_few_files(root: Path) -> None:
    done = _python(root, "bash", "-c", 'ulimit -n 64 && exec "$0" "$@"')
    assert done.returncode == 0 and done.stdout == "loaded\n" and "Traceback" not in done.stderr, done


def test_what_ran_out_is_said() -> None:
    class Source:
        num_workers = 3

        def __init__(self, error: Exception) -> None:
            self.error = error

        def __iter__(self) -> Source:
            raise self.error

    for error in (OSError(28, "No space left on device"), RuntimeError("Too many open files. Communication with\nmore")):
        with pytest.raises(InputError, match=r"^data\.workers=3 cannot go on: (No space|Too many).* MB free, `ulimit -n` is \d+"):
            list(transport.batches_of(Source(error)))  # type: ignore[arg-type]
    full = RuntimeError("unable to mmap 6144 bytes from file <filename not specified>: Cannot allocate memory (12)")
    with pytest.raises(OSError, match="unable to mmap 6144 bytes") as memory:
        list(transport.batches_of(Source(full)))  # type: ignore[arg-type]
    assert memory.value.errno == errno.ENOMEM  # of the machine, not of the configuration
    for error in (
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        EOFError(),
        RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 9) exited unexpectedly"),
    ):
        with pytest.raises(ChildProcessError, match="a loader process was ended from outside"):
            list(transport.batches_of(Source(error)))  # type: ignore[arg-type]
    for error in (
        OSError(12, "Cannot allocate memory"),
        OSError(5, "Input/output error"),
        RuntimeError("a bug"),
        ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0.\n"),
    ):
        with pytest.raises(type(error)) as caught:
            list(transport.batches_of(Source(error)))  # type: ignore[arg-type]
        assert caught.value is error
