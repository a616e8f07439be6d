"""The exceptions that the command line turns into exit codes: 2 for wrong input, 75 for a stop on request."""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_STOPPED = 75


class InputError(ValueError):
    """Something the user gave cannot be used: says what is wrong, what is allowed, and which key or file to change."""


class RunError(RuntimeError):
    """The run cannot go on, and the message says all about it: it is shown once and without a traceback; exit code 1."""


class Stopped(Exception):
    """A signal asked the run to stop; its state is saved and `--resume auto` continues it."""


def exit_code(error: BaseException) -> int:
    """The exit code that an exception ends a command with."""
    if isinstance(error, InputError):
        return EXIT_INPUT
    return EXIT_STOPPED if isinstance(error, Stopped) else EXIT_FAILED
