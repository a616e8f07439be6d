"""Sentences about the run: rank 0 shows them on stdout, and all ranks append theirs to ``log.txt``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from dnc_dist import distributed
from dnc_dist.errors import InputError

_ROOT = logging.getLogger("dnc_dist")


def open_log(run_dir: Path) -> None:
    """Begin to write; warnings of other ranks reach the file only.

    Raises:
        InputError: this rank cannot write there, for example because another machine does not share the folder.
    """
    close_log()
    _ROOT.setLevel(logging.INFO)
    _ROOT.propagate = False
    try:
        file = logging.FileHandler(run_dir / "log.txt", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"rank {distributed.rank()} cannot write {run_dir / 'log.txt'} ({error.strerror}); "
            "run.dir must be a folder that all machines share"
        ) from error
    file.setFormatter(logging.Formatter(f"%(asctime)s rank {distributed.rank()}: %(message)s"))
    if not distributed.is_main():
        file.setLevel(logging.WARNING)
    _ROOT.addHandler(file)
    if distributed.is_main():
        screen = logging.StreamHandler(sys.stdout)
        screen.setFormatter(logging.Formatter("%(message)s"))
        _ROOT.addHandler(screen)


def close_log() -> None:
    """Close what ``open_log`` opened."""
    for handler in list(_ROOT.handlers):
        _ROOT.removeHandler(handler)
        handler.close()
    _ROOT.propagate = True
