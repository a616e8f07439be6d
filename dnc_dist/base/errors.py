"""The exceptions that the command line turns into exit codes: 2 for wrong input, 75 for a stop on request.

What the machine refuses (a full disk, a file without permission, memory) becomes one sentence in ``explain``, the only place that
does so. Errors of our own (TypeError, KeyError, ...) keep their traceback.
"""

from __future__ import annotations

import errno
import os
import re
import traceback
from pathlib import Path

EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_STOPPED = 75


class InputError(ValueError):
    """Something the user gave cannot be used: says what is wrong, what is allowed, and which key or file to change."""


class ConfigError(InputError):
    """The configuration cannot be used; the message lists every problem."""


class RunError(RuntimeError):
    """The run cannot go on, and the message says all about it: it is shown once and without a traceback; exit code 1."""


class Stopped(Exception):
    """A signal asked the run to stop; its state is saved and `--resume auto` continues it."""


def exit_code(error: BaseException) -> int:
    """The exit code that an exception ends a command with."""
    if isinstance(error, InputError):
        return EXIT_INPUT
    return EXIT_STOPPED if isinstance(error, Stopped) else EXIT_FAILED


TRACEBACK = "DNC_TRACEBACK"
"""Environment variable: if set, what the machine refuses keeps its traceback, too."""
_PERMISSION = "change its permissions, or choose another folder"
_PATH = "check the path"
# errno -> what the user can do about it, where it is a file or an address of theirs that is wrong.
_INPUT_CURES = {
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "choose a folder that can be written",
    errno.ENOENT: _PATH,
    errno.ENOTDIR: _PATH,
    errno.EISDIR: _PATH,
    errno.EEXIST: _PATH,
    errno.ELOOP: "its symbolic links lead in a circle; remove one of them",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EADDRINUSE: "choose another port, or end the program that uses it",
}
# errno -> what the user can do about it, where the machine has too little of something or fails.
_MACHINE_CURES = {
    errno.ENOSPC: "free space there, or choose another folder",
    errno.EDQUOT: "free space there, or choose another folder",
    errno.EFBIG: "raise the limit (`ulimit -f unlimited`), or choose another file system",
    errno.EMFILE: "raise the limit of open files (`ulimit -n 4096`)",
    errno.ENFILE: "raise the machine's limit of open files",
    errno.ENOMEM: "use a machine with more memory, or fewer data.workers",
    errno.EAGAIN: "raise the limit of processes (`ulimit -u`), or use fewer data.workers",
    errno.EIO: "check the disk or the shared folder",
    errno.ESTALE: "check the shared folder",
}


def of_the_machine(error: Exception) -> bool:
    """Whether a file could not be read for a reason that says nothing of it: a disk that fails, too many open files."""
    return isinstance(error, OSError) and error.errno in _MACHINE_CURES


def explain(error: Exception) -> Exception:
    """What the machine refuses as an InputError or RunError of one sentence: what, which file, and the cure. Other errors come back."""
    if os.environ.get(TRACEBACK) or isinstance(error, InputError):
        return error
    if isinstance(error, OSError):
        kind: type[Exception] = InputError if error.errno in _INPUT_CURES else RunError
        cure = _INPUT_CURES.get(error.errno or 0) or _MACHINE_CURES.get(error.errno or 0)
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        # An error of a loader process has that process's traceback for a message; its last line is the error.
        what = error.strerror or (str(error).rstrip().splitlines() or [type(error).__name__])[-1]
        text = ": ".join([*names, what]) + (f"; {cure}" if cure else "")
    elif isinstance(error, UnicodeEncodeError | UnicodeDecodeError):
        kind, text = InputError, f"{repr(error.object)[:200]} is no {error.encoding} text ({error.reason}); rename or convert it"
    elif type(error).__name__ in ("DistNetworkError", "DistStoreError"):  # torch's: no OSError, but what one would say
        found = re.search(r"port: (\d+).*name: (E\w+)", str(error))
        number = getattr(errno, found[2], None) if found else None
        if found and number:
            return explain(OSError(number, os.strerror(number), f"port {found[1]}").with_traceback(error.__traceback__))
        kind, text = RunError, str(error).split("\n")[0]
    elif isinstance(error, MemoryError):
        kind, text = RunError, f"out of memory{f' ({error})' if str(error) else ''}; use a machine with more, or smaller batches"
    elif isinstance(error, RecursionError):
        kind, text = RunError, "something is nested too deeply to be read"
    else:
        return error
    return kind(f"{text}\n  ({_place(error)}; {TRACEBACK}=1 shows the whole way there)")


def _place(error: Exception) -> str:
    """Where in our own code an error came up, so that a bug that looks like the machine's fault can be found."""
    package = Path(__file__).parent.parent
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(package)]
    return f"{Path(ours[-1].filename).relative_to(package.parent)}, line {ours[-1].lineno}" if ours else "outside of dnc_dist"
