"""The secret that the machines of one launch share: from the environment, or from a file in the folder that they share anyway."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from dnc_dist.base.errors import InputError
from dnc_dist.base.files import replacing
from dnc_dist.base.foreign import read_bytes

VARIABLE = "DNC_LAUNCH_SECRET"
_LEAST_CHARACTERS = 16
_CURE = f"or set {VARIABLE} to the same random text on all machines, for example that of `openssl rand -hex 32`"


class NoSecretError(Exception):
    """The secret is not there, or not yet; the message says where it should be."""


class Secret:
    """Where the secret of a launch is; as a context, its file is gone in the end.

    Args:
        file: where the machine that others come to writes a fresh one, if the environment has none.

    Raises:
        InputError: there is no place for one, or that of the environment is too short to be one.
    """

    def __init__(self, file: Path | None) -> None:
        given = os.environ.get(VARIABLE, "")
        self._given = given.encode(errors="surrogateescape")
        if given and len(given) < _LEAST_CHARACTERS:
            raise InputError(f"{VARIABLE} has {len(given)} characters; set it to {_LEAST_CHARACTERS} or more that nobody can guess")
        if not given and file is None:
            raise InputError(f"several machines need a secret that they share; set {VARIABLE} to the same random text on all of them")
        self._file = file
        self._written = b""
        self.where = f"{VARIABLE} of this machine" if given else str(file)

    def renew(self) -> bytes:
        """The secret of a launch that begins here; the file is written anew, readable for its owner alone.

        Raises:
            InputError: it cannot be written, or would not be private.
        """
        if self._given or self._file is None:
            return self._given
        self._written = secrets.token_hex(32).encode()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._file, mode=0o600) as file:
                if os.fstat(file.fileno()).st_mode & 0o077:
                    raise InputError(
                        f"{self._file.parent} is on a file system where every file can be read by others; use another run.dir, {_CURE}"
                    )
                file.write(self._written)
        except OSError as error:
            raise InputError(
                f"the secret of this launch cannot be written to {self._file} ({error.strerror}); make its folder writable, {_CURE}"
            ) from error
        return self._written

    def read(self) -> bytes:
        """The secret of the launch that another machine has begun.

        Raises:
            NoSecretError: it is not there.
            InputError: it is there, but cannot be used.
        """
        if self._given or self._file is None:
            return self._given
        try:
            status = self._file.lstat()
            found = read_bytes(self._file, most=4096) if stat.S_ISREG(status.st_mode) else b""
        except (OSError, InputError) as error:
            # Also if it goes away just now: a file system of several machines has many ways to say so.
            why = error.strerror if isinstance(error, OSError) else error
            raise NoSecretError(f"no secret in {self._file} ({why}); run.dir must be a folder that all machines share, {_CURE}") from error
        if not found or status.st_mode & 0o077:
            raise InputError(
                f"{self._file} can be read by others, or is no file (mode {status.st_mode & 0o777:03o}): it is no secret, remove it"
            )
        return found

    def __enter__(self) -> Secret:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """The launch that began here is over: its file goes, unless another one has written its own."""
        if self._written and self._file is not None:
            # If that cannot be done, nothing is lost: the next launch writes a new one.
            with suppress(OSError):
                if self._file.read_bytes() == self._written:
                    self._file.unlink()
