"""Files on web servers (http, https), read from front to back: what breaks off is taken up again, what is wrong is said at once."""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from dnc_dist.base.errors import InputError, RunError
from dnc_dist.base.files import replacing

if TYPE_CHECKING:  # imported where a server is asked: most runs ask none
    import requests

_log = logging.getLogger(__name__)
_CONNECT_SECONDS, _READ_SECONDS = 10.0, 30.0  # without any answer; then it is tried again
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 30.0
_PIECE = 1 << 16  # bytes that are lost at most when a connection breaks
_MOST_CONNECTIONS = 256
# Statuses that may pass: a server that is busy, or starts.
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_SEE_ROOT = "check data.root"


@dataclass(frozen=True)
class Web:
    """How files on servers are read.

    ``patience`` seconds that a server may give nothing before the run ends; ``cache`` the folder where what was read is kept, None:
    nowhere; ``cache_bytes`` the most that is kept.
    """

    patience: float = 120.0
    cache: Path | None = None
    cache_bytes: int = 0


AS_USUAL = Web()


@cache
def _session(process: int) -> requests.Session:
    """The connections of a process; proxies and passwords (~/.netrc) are those of the environment."""
    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=_MOST_CONNECTIONS))
    return session


class _Passing(Exception):
    """A failure that may be over when one tries again; ``wait`` seconds, if the server says so."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Download(io.RawIOBase):
    """The bytes [start, stop) of a file on a server.

    A connection that breaks or is silent is made again where it broke off, at longer and longer intervals, as long as ``patience``
    seconds have not passed since the last byte. A server that knows no ranges sends what came before once more, which is thrown away.

    Args:
        url: of the file.
        start: first byte.
        stop: behind the last byte; None: to the end.
        size: of the whole file, if it is known.
        patience: seconds without a byte.

    Raises (when reading):
        InputError: the server has no such file, refuses it, or has another one than before.
        RunError: it does not answer, or breaks off again and again.
    """

    def __init__(self, url: str, start: int = 0, stop: int | None = None, *, size: int | None = None, patience: float) -> None:
        self.url, self.position, self.stop, self.size, self.patience = url, start, stop, size, patience
        self._response: requests.Response | None = None
        self._tag: str | None = None

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """As of ``io.RawIOBase``."""
        since, tries, wait = time.monotonic(), 0, 0.0
        while self.stop is None or self.position < self.stop:
            try:
                data = self._read(min(len(buffer), _PIECE))
            except _Passing as failure:
                self._disconnect()
                tries += 1
                passed = time.monotonic() - since
                if passed >= self.patience:
                    raise RunError(
                        f"{self.url} cannot be read: {failure}; tried {tries} times in {passed:.0f} s (data.retry_seconds), after "
                        f"{self.position:,} bytes; see to the server and the network, then `--resume auto` goes on"
                    ) from None
                # At once the first time: a server may end a connection only because it was not used for a while.
                time.sleep(min(max(wait, failure.wait), _LONGEST_WAIT, self.patience - passed))
                if wait >= 2:
                    _log.warning("%s: %s; trying again for %.0f s", self.url, failure, self.patience - passed)
                wait = min(max(2 * wait, _FIRST_WAIT), _LONGEST_WAIT)
                continue
            buffer[: len(data)] = data
            self.position += len(data)
            return len(data)
        return 0

    def _read(self, count: int) -> bytes:
        """Up to so many bytes; none at the end of a file whose size nobody knows."""
        import requests
        import urllib3

        try:
            if self._response is None:
                self._response = self._connect()
            if self.stop is not None:
                count = min(count, self.stop - self.position)
            data: bytes = self._response.raw.read(count)
        except requests.exceptions.SSLError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise InputError(f"{self.url}: the server's certificate is not trusted ({_brief(error)}); {_SEE_ROOT}") from None
            raise _Passing(_brief(error)) from None
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.exceptions.TooManyRedirects) as error:
            raise InputError(f"{self.url} cannot be read ({_brief(error)}); {_SEE_ROOT}") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise _Passing(_brief(error)) from None
        if not data and self.stop is not None:
            raise _Passing(f"the server ended the connection {self.stop - self.position:,} bytes before the end")
        return data

    def _connect(self) -> requests.Response:
        """A response whose next byte is the one at ``position``."""
        wanted = f"bytes={self.position}-{'' if self.stop is None else self.stop - 1}"
        response = _session(os.getpid()).get(
            self.url,
            # Without compression: bytes are counted.
            headers={"Accept-Encoding": "identity", **({"Range": wanted} if self.position or self.stop is not None else {})},
            stream=True,
            timeout=(_CONNECT_SECONDS, _READ_SECONDS),
        )
        try:
            self._check(response)
            if response.status_code == 200:
                left = self.position
                while left:
                    data = response.raw.read(min(left, _PIECE))
                    if not data:
                        raise _Passing("the server ended the connection early")
                    left -= len(data)
        except BaseException:
            response.close()
            raise
        return response

    def _check(self, response: requests.Response) -> None:
        status = response.status_code
        if status in _PASSING:
            after = response.headers.get("Retry-After", "")
            raise _Passing(f"the server answers {status} {response.reason}", float(after) if after.isdecimal() else 0.0)
        if status not in (200, 206):
            raise InputError(
                f"{self.url}: the server answers {status} {response.reason}; {_SEE_ROOT}, and that the data set there is complete"
            )
        unit, _, told = response.headers.get("Content-Range", "").partition(" ")
        span, _, total = told.partition("/")
        if status == 206 and (unit != "bytes" or span.partition("-")[0] != str(self.position)):
            raise InputError(f"{self.url}: the server sends other bytes than it was asked for; {_SEE_ROOT}")
        length = total if status == 206 else response.headers.get("Content-Length", "")
        if self.size is not None and length.isdecimal() and int(length) != self.size:
            raise InputError(
                f"{self.url} has {int(length):,} bytes instead of {self.size:,}: it is truncated or was changed; copy it there again"
            )
        if self.stop is None and length.isdecimal():
            self.stop = self.size = int(length)
        tag = response.headers.get("ETag")
        if self._tag is not None and tag is not None and tag != self._tag:
            raise InputError(f"{self.url} was changed while it was being read; start again when the data set there is complete")
        self._tag = tag or self._tag

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def close(self) -> None:
        """End the connection, or keep it for another file if this one is read to its end."""
        if self._response is not None and self.position == self.stop:
            self._response.raw.release_conn()
            self._response = None
        self._disconnect()
        super().close()


def _brief(error: BaseException) -> str:
    """The innermost error that a library wrapped, on one line."""
    while isinstance(inner := error.__cause__ or error.__context__ or getattr(error, "reason", None), BaseException):
        error = inner
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'}"


def knows_ranges(url: str, patience: float) -> bool:
    """Whether a server sends parts of a file, so that reading may begin in its middle.

    Raises:
        InputError, RunError: as of ``Download``.
    """
    with Download(url, 1, 2, patience=patience) as download:
        download.read(1)
        response = download._response
        return response is not None and response.status_code == 206


def open_url(url: str, start: int, stop: int, *, size: int, patience: float) -> BinaryIO:
    """The bytes [start, stop) of a file, to be read from front to back; errors as of ``Download``."""
    return io.BufferedReader(Download(url, start, stop, size=size, patience=patience), 1 << 18)


def pieces(url: str, most: int, patience: float) -> Iterator[bytes]:
    """The bytes of a whole file, piece by piece.

    Raises:
        InputError: it is not there, or has more than ``most`` bytes.
        RunError: the server does not answer.
    """
    with Download(url, patience=patience) as source:
        while piece := source.read(1 << 20):
            if source.position > most:
                raise InputError(f"{url} has more than {most:,} bytes; it is not what it should be")
            yield piece


def fetch(url: str, path: Path, most: int, patience: float) -> None:
    """Copy a file of a server, whole or not at all; others may do the same at the same time. Errors as of ``pieces``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.writelines(pieces(url, most, patience))
