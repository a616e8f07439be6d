"""The segments of a JPEG file: those that decoding needs, and those that tell where and by whom it was taken."""

from __future__ import annotations

import re

_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)  # neither stuffed nor a restart inside compressed pixels
_SOI, _EOI, _SOS, _COM, _APP0, _APP14, _APP15 = 0xD8, 0xD9, 0xDA, 0xFE, 0xE0, 0xEE, 0xEF
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, Huffman coded
_TABLES = (0xC4, 0xDB, 0xDD)  # of codes, of quantisation, and how often restart markers come
_JFIF_SIZE = 14
_ADOBE_SIZE = 12


def plain_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG of three colours with 8 bits whose header says nothing more than how to decode it; None of any other.

    Only what every decoder understands alike stands before its pixels: tables, JFIF, and Adobe's segment on the colours. No EXIF, then,
    that would turn it. Whether its pixels are whole is not looked at. What ``without_metadata`` returns is plain, if it has three colours.
    """
    size = None
    at = 2
    if data[:2] != b"\xff\xd8":
        return None
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if marker == _SOS:
            return size
        if marker in _FRAMES and size is None and len(body) == 15 and body[0] == 8 and body[5] == 3:
            size = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
        elif not (
            marker in _TABLES
            or (marker == _APP0 and len(body) == _JFIF_SIZE and body.startswith(b"JFIF\x00"))
            or (marker == _APP14 and len(body) == _ADOBE_SIZE and body.startswith(b"Adobe"))
        ):
            return None
        at += 2 + length
    return None


def without_metadata(data: bytes) -> bytes:
    """The same compressed pixels without comments, EXIF, XMP, IPTC, colour profile, thumbnails, and what follows the image.

    JFIF (APP0) and Adobe (APP14) segments stay: they say how the colours are coded. The colour profile is left out because
    decoding does not apply it.

    Raises:
        ValueError: no JPEG, or a segment that reaches beyond the end.
    """
    parts = [b"\xff\xd8"]
    at = 2
    if data[:2] != parts[0]:
        raise ValueError("no JPEG")
    while (match := _MARKER.search(data, at)) is not None:
        marker = data[match.end() - 1]
        if marker == _EOI:
            break
        if marker == 0x01 or marker == _SOI:  # these have no length
            at = match.end()
            continue
        end = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
        if end < match.end() + 2 or end > len(data):
            raise ValueError("a JPEG segment reaches beyond the end")
        body = data[match.end() + 2 : end]
        at = end
        if marker == _APP0:
            if body.startswith(b"JFIF\x00") and len(body) >= _JFIF_SIZE:
                # Without its thumbnail, whose width and height are the last two bytes.
                parts.append(b"\xff\xe0\x00\x10" + body[: _JFIF_SIZE - 2] + b"\x00\x00")
        elif _APP0 < marker <= _APP15 or marker == _COM:
            if marker == _APP14 and body.startswith(b"Adobe"):
                parts.append(b"\xff\xee" + data[match.end() : end])
        else:
            if marker == _SOS:  # compressed pixels follow, up to the next marker
                following = _MARKER.search(data, end)
                at = following.start() if following else len(data)
            parts.append(b"\xff" + data[match.end() - 1 : at])
    return b"".join([*parts, b"\xff\xd9"])
