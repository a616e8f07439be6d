"""Addresses of folders on web servers."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit


def is_url(root: str | Path) -> bool:
    """Whether this is an address (http, https) and no path. A ``Path`` never is: it would have lost a slash."""
    return isinstance(root, str) and root.lower().startswith(("http://", "https://"))


def folder_url(text: str) -> str:
    """An address to which names of files can be joined: with a slash at its end.

    Raises:
        ValueError: it names no host, or more than a folder.
    """
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"is no address ({error})") from None
    if not host:
        raise ValueError("names no host; write https://HOST/FOLDER")
    if parts.query or parts.fragment:
        raise ValueError("must end with the folder, without ? and #, since names of files follow")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must hold no password, since it is written into logs and checkpoints; put it into ~/.netrc")
    return text if text.endswith("/") else f"{text}/"
