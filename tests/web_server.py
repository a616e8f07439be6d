"""A real web server on this machine, for a folder, with the faults of a long way: slow, busy, broken off, without ranges, replaced."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server:
    """What a server does, to be changed while it runs, and what it was asked for.

    ``fault(name, times)`` is called with the name of the file and how often it was asked for; it returns None, a status to answer with,
    or a number of bytes (negative) after which the connection is cut. ``pause`` seconds before every 16 KB.
    """

    def __init__(self) -> None:
        self.url = ""
        self.ranges = True
        self.pause = 0.0
        self.fault: Callable[[str, int], int | None] = lambda name, times: None
        self.asked: list[tuple[str, str | None]] = []
        self.sent = 0

    def requests(self, name: str) -> list[str | None]:
        """The ranges that were asked of a file, None: the whole."""
        return [span for asked, span in self.asked if asked == name]


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server_state: Server, *args: object, **kwargs: object) -> None:
        self.state = server_state
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def log_message(self, *told: object) -> None:
        pass

    def do_GET(self) -> None:
        state, path = self.state, Path(self.translate_path(self.path))
        span = self.headers.get("Range")
        state.asked.append((path.name, span))
        fault = state.fault(path.name, len(state.requests(path.name)))
        if fault is not None and fault > 0:
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        start, stop = 0, len(content)
        if span and state.ranges:
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", span)
            assert found is not None, span
            start, stop = int(found[1]), min(int(found[2]) + 1 if found[2] else stop, stop)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{hash(content)}"')
        self.end_headers()
        cut = stop - start if fault is None else min(-fault, stop - start)
        for at in range(start, start + cut, 1 << 14):
            time.sleep(state.pause)
            piece = content[at : min(at + (1 << 14), start + cut)]
            try:
                self.wfile.write(piece)
            except (BrokenPipeError, ConnectionResetError):
                return
            state.sent += len(piece)
        if fault is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)


class _Web(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *told: object) -> None:
        """A client that went away is no news."""


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server of the folder's files, on a free port."""
    state = Server()
    web = _Web(("127.0.0.1", 0), partial(_Handler, state, directory=str(folder)))
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{web.server_address[1]}/"
    try:
        yield state
    finally:
        web.shutdown()
        web.server_close()
        thread.join()
