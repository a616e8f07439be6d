"""Sentences about the run: rank 0 shows them on stdout, and all ranks append theirs to ``log.txt``."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from pathlib import Path

from dnc_dist.base.errors import InputError, Stopped
from dnc_dist.processes import distributed
from dnc_dist.rundir import LOG_FILE

_ROOT = logging.getLogger("dnc_dist")
_OF_FILE = "of_file"
"""An attribute of records that the screen does not show."""
_NOTHING = logging.CRITICAL + 1
"""A level that no message has."""


class _LogFile(logging.FileHandler):
    """``log.txt``; a disk that takes no more of it is said once, and costs the run nothing else."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Called in the handling of the exception that a write ended with."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif self.level != _NOTHING:
            self.setLevel(_NOTHING)
            _ROOT.warning("%s cannot be written (%s); the run goes on without it", self.baseFilename, error.strerror)

    def close(self) -> None:
        """What a full disk did not take is lost."""
        with suppress(OSError):
            super().close()


def open_log(run_dir: Path) -> None:
    """Begin to write; warnings of other ranks reach the file only.

    Raises:
        InputError: this rank cannot write there, for example because another machine does not share the folder.
    """
    close_log()
    _ROOT.setLevel(logging.INFO)
    _ROOT.propagate = False
    try:
        file = _LogFile(run_dir / LOG_FILE, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(
            f"rank {distributed.rank()} cannot write {run_dir / LOG_FILE} ({error.strerror}); "
            "run.dir must be a folder that all machines share"
        ) from error
    file.setFormatter(logging.Formatter(f"%(asctime)s rank {distributed.rank()}: %(message)s"))
    if not distributed.is_main():
        file.setLevel(logging.WARNING)
    _ROOT.addHandler(file)
    if distributed.is_main():
        screen = logging.StreamHandler(sys.stdout)
        screen.setFormatter(logging.Formatter("%(message)s"))
        screen.addFilter(lambda record: not hasattr(record, _OF_FILE))
        _ROOT.addHandler(screen)


def log_ending(error: Exception) -> None:
    """Write to ``log.txt`` alone why the run does not go on: on the screen it is said by who catches the error."""
    if isinstance(error, Stopped):
        _ROOT.info("stopped: %s", error, extra={_OF_FILE: True})
    else:
        _ROOT.error("%s: %s", type(error).__name__, error, extra={_OF_FILE: True})


def close_log() -> None:
    """Close what ``open_log`` opened."""
    for handler in list(_ROOT.handlers):
        _ROOT.removeHandler(handler)
        handler.close()
    _ROOT.propagate = True
