"""A contact sheet of what was found: a query a row, left the query, right its hits, with their classes and similarities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from dnc_dist.base.errors import InputError
from dnc_dist.base.fonts import font
from dnc_dist.base.foreign import read_bytes
from dnc_dist.data.images import DECODE_ERRORS, decode
from dnc_dist.data.listing import MOST_BYTES
from dnc_dist.inference.search import Answer

MOST_QUERIES, MOST_HITS = 100, 20
"""That are drawn."""
_CELL, _TEXT, _GAP, _MARGIN = 112, 30, 16, 8
_GREY, _LIGHT = (90, 90, 90), (232, 232, 232)


def contact_sheet(answers: Sequence[Answer]) -> Image.Image:
    """The first 100 queries and of each the first 20 hits; a picture whose file is not there any more is a grey field."""
    shown = answers[:MOST_QUERIES]
    columns = max(min(len(answer.hits), MOST_HITS) for answer in shown)
    height = _CELL + _TEXT
    sheet = Image.new("RGB", (2 * _MARGIN + (columns + 1) * _CELL + _GAP, 2 * _MARGIN + len(shown) * height), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.font = font(10)
    for line, answer in enumerate(shown):
        top = _MARGIN + line * height
        _draw(sheet, draw, (_MARGIN, top), answer.path, ["query", Path(answer.query).name])
        for hit in answer.hits[:MOST_HITS]:
            left = _MARGIN + _CELL + _GAP + (hit.rank - 1) * _CELL
            _draw(sheet, draw, (left, top), hit.path, [f"{hit.similarity:.3f}", hit.class_name or Path(hit.key).name])
        draw.line((_MARGIN + _CELL + _GAP // 2, top, _MARGIN + _CELL + _GAP // 2, top + _CELL), fill=_GREY)
    return sheet


def _draw(sheet: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], path: str | None, lines: list[str]) -> None:
    left, top = corner
    if (picture := _picture(path)) is None:
        draw.rectangle((left + 2, top + 2, left + _CELL - 3, top + _CELL - 3), fill=_LIGHT)
        draw.text((left + 8, top + _CELL // 2 - 6), "no picture", fill=_GREY)
    else:
        sheet.paste(picture, (left + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2))
    for number, line in enumerate(lines):
        draw.text((left + 4, top + _CELL + 1 + 13 * number), _fitting(draw, line), fill=_GREY)


def _fitting(draw: ImageDraw.ImageDraw, line: str) -> str:
    if draw.textlength(line) <= _CELL - 8:
        return line
    while line and draw.textlength(f"{line}…") > _CELL - 8:
        line = line[:-1]
    return f"{line}…"


def _picture(path: str | None) -> Image.Image | None:
    """The picture in a cell's size; None where there is none any more."""
    if path is None:
        return None
    try:
        image = decode(read_bytes(Path(path), MOST_BYTES))
    except (InputError, *DECODE_ERRORS):
        return None
    side = _CELL - 4
    scale = side / max(image.size)
    # Small pictures are enlarged, too: a sheet of 16 pixels shows nothing.
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)
