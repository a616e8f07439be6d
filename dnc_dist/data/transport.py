"""How a batch comes from a loader worker: its images in shared memory, or through the pipe where /dev/shm has no room for them.

A loader would put every tensor into shared memory itself, in a thread of the worker: an error there is printed and the batch is
lost, for which the training would wait for ever. Here it is done before, in the worker's main thread.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from functools import cache
from signal import SIGINT
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.data.loading import Batch, DecodedBlock
from dnc_dist.data.workers import worker_context, worker_start
from dnc_dist.processes.signals import signals_held

_log = logging.getLogger(__name__)
_SHARED_MEMORY = "/dev/shm"
# What Linux reports when shared memory, open files or processes run out; torch wraps some of them in words of its own.
_EXHAUSTED = {errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EAGAIN}
PREFETCH = 2
"""Batches that each worker has ready."""


class _Packed(NamedTuple):
    """A batch on its way: ``images`` is an array if it did not fit into shared memory; ``others`` are its other fields, none a tensor."""

    kind: type[Batch | DecodedBlock]
    images: Tensor | NDArray[np.uint8]
    others: list[Any]


def _pack(batch: Any) -> Batch | DecodedBlock | _Packed:
    """The batch as it travels from a worker; itself if there is none."""
    if get_worker_info() is None:
        return batch
    images: Tensor | NDArray[np.uint8]
    try:
        images = batch.images.share_memory_()
    except RuntimeError:  # torch cannot say it otherwise: no memory there, or no file descriptor left
        images = batch.images.numpy()
    return _Packed(type(batch), images, [value.numpy() if isinstance(value, Tensor) else value for value in batch[1:]])


def _unpack(packed: Batch | DecodedBlock | _Packed) -> Batch | DecodedBlock:
    if not isinstance(packed, _Packed):
        return packed
    images = packed.images
    if not isinstance(images, Tensor):
        _tell_of_pipes()
        images = torch.from_numpy(images)
    return packed.kind._make([images, *(torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in packed.others)])


def loader(
    dataset: Dataset[Any],
    *,
    workers: int,
    prefetch: int = PREFETCH,
    pin_memory: bool,
    sampler: Sampler[Any] | None = None,
    keep_workers: bool = False,
) -> DataLoader[Any]:
    """A loader of a dataset whose items are batches or blocks; read it through ``batches_of``."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        collate_fn=_pack,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=keep_workers and workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=worker_start(),
        multiprocessing_context=worker_context(workers),
        generator=torch.Generator(),  # without its own, a loader draws from the global one, which a resume would have to replay
    )


def batches_of(source: DataLoader[Any]) -> Iterator[Any]:
    """The batches or blocks of a loader.

    Raises:
        InputError: a shard is damaged, or the machine has no shared memory, files or processes left for so many workers.
        RunError: a server with shards does not answer.
        OSError: the machine has no memory left (ENOMEM), whatever torch calls it.
        ChildProcessError: a loader process is gone.
    """
    failure: Exception
    try:
        with signals_held(SIGINT):
            batches = iter(source)
        for packed in batches:
            yield _unpack(packed)
        return
    except (InputError, RunError) as error:
        # From a worker it comes with that process's whole traceback before the message.
        failure = type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2].rstrip())
    except (OSError, EOFError, RuntimeError) as error:
        if not source.num_workers:
            raise
        reason = _exhausted(error)
        if _is_of_dead_worker(error):
            failure = ChildProcessError(
                errno.ECHILD,
                "a loader process was ended from outside, as by the kernel when memory is short (lower data.workers then), or by an "
                "error of its own, which stands above",
            )
        elif reason is None:
            raise
        elif os.strerror(errno.ENOMEM) in reason:
            failure = OSError(errno.ENOMEM, reason)
        else:
            failure = InputError(
                f"data.workers={source.num_workers} cannot go on: {reason}; {_SHARED_MEMORY} has {_free()}, `ulimit -n` is "
                f"{os.sysconf('SC_OPEN_MAX')}; raise the limit, or set data.workers lower (0 needs none)"
            )
    # Not from inside: the first error's frames hold the loader, whose workers end when nothing does.
    raise failure


def _is_of_dead_worker(error: Exception) -> bool:
    """Whether a loader process is gone: torch says so, or the connection to it broke while a batch came through."""
    text = str(error)
    if isinstance(error, ConnectionError | EOFError):
        return not text.startswith("Caught ")  # what the process itself met
    return text.startswith("DataLoader worker (pid") and ("killed by signal" in text or "exited unexpectedly" in text)


def _exhausted(error: OSError | EOFError | RuntimeError) -> str | None:
    """What ran out, or None if the error says something else."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _EXHAUSTED else None
    text = str(error).partition("\n")[0]
    return text if text.startswith(("Too many open files", "received 0 items of ancdata", "unable to ")) else None


def _free() -> str:
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except FileNotFoundError:
        return "none"
    return f"{status.f_bavail * status.f_frsize >> 20:,} of {status.f_blocks * status.f_frsize >> 20:,} MB free"


@cache
def _tell_of_pipes() -> None:
    """Once in a process."""
    _log.warning(
        "%s has no room for batches (%s): they come through pipes, which is slower; give it more (`docker run --shm-size=8g`), or set "
        "data.workers lower",
        _SHARED_MEMORY,
        _free(),
    )
