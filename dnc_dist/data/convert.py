"""Images as shards hold them, converted by several processes: in order, and the same bytes for any number of them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from signal import SIGINT

from dnc_dist.base.errors import RunError, explain, of_the_machine
from dnc_dist.data.images import DECODE_ERRORS, Form, normalise, why_not
from dnc_dist.data.readers import Sample
from dnc_dist.processes.signals import signals_held

_CHUNK, _AHEAD = 16, 4  # images that a process is given at a time, and such parts in memory for each process
_WORTH = 128  # images: with fewer for each, processes take longer to start than to convert


def convert(samples: list[Sample], form: Form, processes: int) -> Generator[tuple[Sample, bytes | str], None, None]:
    """Each image as stored, or why it cannot be read, in the order of the samples.

    Args:
        samples: where images are.
        form: of those that are encoded anew.
        processes: at most so many convert; few images are converted in this one.

    Raises:
        RunError: a process was killed.
    """
    chunks = [samples[first : first + _CHUNK] for first in range(0, len(samples), _CHUNK)]
    processes = min(processes, len(samples) // _WORTH)
    if processes < 2:
        for chunk in chunks:
            yield from _pair(chunk, _converted(chunk, form))
        return
    # Spawned, so that they hold nothing of this process: neither its threads' locks nor the lock of the folder.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        flying: deque[tuple[list[Sample], Future[list[bytes | str]]]] = deque()
        for chunk in chunks:
            with signals_held(SIGINT):
                flying.append((chunk, pool.submit(_converted, chunk, form)))
            if len(flying) > processes * _AHEAD:
                done, future = flying.popleft()
                yield from _pair(done, future.result())
        for done, future in flying:
            yield from _pair(done, future.result())
    except BrokenProcessPool:
        raise RunError(
            "a process that converts images was killed, perhaps as memory ran out; the same command goes on; give it fewer --processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _pair(samples: list[Sample], images: list[bytes | str]) -> Iterator[tuple[Sample, bytes | str]]:
    return zip(samples, images, strict=True)


def _converted(samples: list[Sample], form: Form) -> list[bytes | str]:
    results: list[bytes | str] = []
    for sample in samples:
        try:
            results.append(normalise(sample.read(), form, sample.box))
        except DECODE_ERRORS as error:
            if of_the_machine(error):  # told as a RunError, after which the same command goes on
                raise explain(error) from error
            results.append(why_not(error))
    return results


def _begin() -> None:
    """In each process: nothing goes on when the first one is killed."""
    first = multiprocessing.parent_process()
    assert first is not None

    def end_with(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_with, args=(first.sentinel,), daemon=True).start()
