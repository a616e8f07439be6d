"""A file of embeddings of many images: by one process or several, the same bytes from any number, resumed where it was interrupted."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT
from typing import Any

import torch

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.base.progress import Progress
from dnc_dist.data.listing import Images, list_images
from dnc_dist.data.readers import plain
from dnc_dist.data.workers import worker_start
from dnc_dist.embedder import Embedder, load
from dnc_dist.inference.blocks import BlockFolder, Plan, write_block
from dnc_dist.inference.table import Keys, Origin, check_place, write_table
from dnc_dist.processes.cores import usable_cores
from dnc_dist.processes.signals import signals_held

BLOCK_ROWS = 256
"""Images of a block, at least: what an interruption costs each process."""
_MOST_PROCESSES = 8
"""Without a GPU and without ``nproc``."""


@dataclass(frozen=True)
class Written:
    """What was written: how many embeddings of how many dimensions, and the images that could not be read (key, why)."""

    rows: int
    dim: int
    unreadable: list[tuple[str, str]]


def embed_to_file(
    run: Path,
    data: Path,
    out: Path,
    *,
    split: str | None = None,
    checkpoint: str = "best",
    nproc: int | None = None,
    tell: Callable[[str], None],
) -> Written:
    """Embed images into ``out``, a .parquet or .npy file; see ``list_images`` for what ``data`` may be.

    Images are embedded in blocks that depend on nothing but the list, and each process computes with one thread on the CPU: so the file
    is the same for any number of processes. Finished blocks lie beside it until it is whole.

    Args:
        run: a run directory, or an exported model.
        data: the images.
        out: the file; one that is there is replaced at the end.
        split: of a prepared data set.
        checkpoint: of the run.
        nproc: processes; None: one for each GPU, without a GPU one for each core, 8 at most.
        tell: takes sentences for the user.

    Raises:
        InputError: there is no such model, or no image that can be read.
        RunError: a process was killed.
    """
    check_place(out)
    images = list_images(data, split)
    model = load(run, checkpoint=checkpoint)
    block_rows = -(-BLOCK_ROWS // model.batch_size) * model.batch_size
    plan = Plan(model.fingerprint, images.digest(), len(images), block_rows, model.batch_size)
    blocks = BlockFolder(out, plan)
    if blocks.note:
        tell(blocks.note)
    missing = blocks.missing()
    if len(missing) < len(plan):
        tell(f"{len(plan) - len(missing)} of {len(plan)} blocks are there already; it goes on")
    _compute(model, images, blocks, missing, nproc)
    failed = {at: why for number in range(len(plan)) for at, why in blocks.failed(number).items()}
    if len(failed) == len(images):
        blocks.remove()
        raise InputError(f"no image of {data} can be read; the first is {images.keys[0]} ({failed[0]})")
    unreadable = [(images.keys[at], why) for at, why in failed.items()]
    keys = _keys(images, Origin(model.fingerprint, plain(run.resolve()), model.checkpoint, unreadable), failed)
    write_table(out, keys, model.dim, (blocks.vectors(number, model.dim) for number in range(len(plan))))
    blocks.remove()
    return Written(len(keys), model.dim, unreadable)


def _keys(images: Images, origin: Origin, failed: dict[int, str]) -> Keys:
    def kept(values: list[Any]) -> list[Any]:
        return [value for at, value in enumerate(values) if at not in failed]

    return Keys(origin, kept(images.keys), kept(images.paths), kept(images.classes), kept(images.labels))


def _compute(model: Embedder, images: Images, blocks: BlockFolder, missing: list[int], nproc: int | None) -> None:
    """Embed the missing blocks."""
    cores = len(usable_cores())
    wanted = nproc or torch.cuda.device_count() or min(cores, _MOST_PROCESSES)
    rows = sum(stop - start for start, stop in map(blocks.plan.bounds, missing))
    finished = _here if min(wanted, len(missing)) < 2 else _in_processes
    with Progress(True).phase("embedding", rows, "img") as phase:
        for number in finished(model, images, blocks, missing, min(wanted, len(missing))):
            start, stop = blocks.plan.bounds(number)
            phase.update(stop - start)


def _here(model: Embedder, images: Images, blocks: BlockFolder, missing: list[int], nproc: int) -> Iterator[int]:
    with _one_thread(model.device):
        for number in missing:
            write_block(blocks.file(number), model.embed_bytes(images.readers(*blocks.plan.bounds(number))))
            yield number


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Sums depend on the number of threads; the number of processes must not."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _in_processes(model: Embedder, images: Images, blocks: BlockFolder, missing: list[int], nproc: int) -> Iterator[int]:
    # Forked from a server that has imported all of it once, and has one thread (data/workers.py says why).
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dnc_dist.embedder"])
    start = (worker_start(), context.Value("i", 0), model.source, model.checkpoint)
    pool = ProcessPoolExecutor(nproc, context, _start_worker, start)
    running: dict[Future[None], int] = {}
    waiting = iter(missing)
    try:
        while True:
            # Few at a time: a list of all that is to be read would be long.
            while len(running) < 2 * nproc and (number := next(waiting, None)) is not None:
                readers = images.readers(*blocks.plan.bounds(number))
                with signals_held(SIGINT):
                    running[pool.submit(_embed_block, blocks.file(number), readers)] = number
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                yield running.pop(future)
    except BrokenProcessPool as error:
        raise RunError(
            "a process ended before its work was done (killed, or out of memory?); the same command goes on with what is there, "
            "--nproc starts fewer"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_model: Embedder
"""In a process of its own: the model."""


def _start_worker(start: Callable[[int], None], count: Any, run: Path, checkpoint: str) -> None:
    """Load the model, on a GPU of this process's own as far as there are enough; end with the process that started this one."""
    start(0)
    with count.get_lock():
        number = count.value
        count.value += 1
    gpus = torch.cuda.device_count()
    if not gpus:
        torch.set_num_threads(1)
    global _model
    _model = load(run, checkpoint=checkpoint, device=f"cuda:{number % gpus}" if gpus else "cpu")


def _embed_block(path: Path, readers: list[Callable[[], bytes]]) -> None:
    write_block(path, _model.embed_bytes(readers))
