"""Queries with their nearest neighbours: as HTML for the report, as one picture for everything else."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw

from dnc_dist.base.fonts import font
from dnc_dist.report import names
from dnc_dist.report.markup import Html, element
from dnc_dist.report.pictures import data_url
from dnc_dist.rundir.gallery import PictureGallery

RIGHT, WRONG = "#16a34a", "#dc2626"
_MOST_NEIGHBOURS = 20


def confident_mistakes(gallery: PictureGallery) -> np.ndarray:
    """Queries whose nearest neighbour is wrong, the closest (most confident) first. (m,) positions among the queries."""
    wrong = np.flatnonzero(~gallery.correct()[:, 0] & (gallery.neighbour_rows[:, 0] >= 0))
    return wrong[np.argsort(gallery.distances[wrong, 0], kind="stable")]


def _tile(pixels: np.ndarray, name: str, below: str, kind: str) -> Html:
    words, short = names.full(name), names.shown(name)
    picture = element("img", src=data_url(pixels), alt=words, title=words, width="64", height="64")
    return element("figure", picture, element("figcaption", element("span", short), element("small", below)), cls=f"tile {kind}")


def query_html(gallery: PictureGallery, query: int) -> Html:
    """One query and its neighbours as a row of pictures, right ones framed green, wrong ones red."""
    correct = gallery.correct()[query]
    tiles = [_tile(gallery.query_images[query], gallery.name(int(gallery.query_labels[query])), "query", "query")]
    for column in np.flatnonzero(gallery.neighbour_rows[query] >= 0)[:_MOST_NEIGHBOURS]:
        name = gallery.name(int(gallery.neighbour_labels[query, column]))
        mark = "right" if correct[column] else "wrong"
        sign = "✓" if correct[column] else "✗"  # for those who cannot tell the colours apart
        tiles.append(_tile(gallery.neighbour_images[query, column], name, f"{sign} {gallery.distances[query, column]:.2f}", mark))
    return element("div", *tiles, cls="query-row")


def gallery_image(gallery: PictureGallery, *, queries: int, neighbours: int = 8, side: int = 96) -> bytes:
    """A PNG with a row for each of the first queries: the query, then its nearest neighbours framed green (right) or red (wrong).

    Args:
        queries: rows; fewer if the gallery has fewer.
        neighbours: neighbours of each.
        side: pixels of one picture.
    """
    rows, columns = min(queries, len(gallery.query_rows)), min(neighbours, gallery.neighbour_rows.shape[1])
    gap, frame, margin, head = side // 8, max(3, side // 24), side // 6, side // 3
    width = 2 * margin + (columns + 1) * side + columns * gap + 2 * gap
    canvas = Image.new("RGB", (width, margin + head + rows * (side + gap) - gap + margin), "white")
    pen, letters = ImageDraw.Draw(canvas), font(max(11, side // 7))
    first = margin + side + 3 * gap
    pen.text((margin, margin // 2), "query", "#1f2933", letters)
    pen.text((first, margin // 2), "nearest neighbours, nearest first", "#1f2933", letters)
    correct = gallery.correct()
    for row in range(rows):
        top = margin + head + row * (side + gap)
        canvas.paste(Image.fromarray(gallery.query_images[row]).resize((side, side), Image.Resampling.LANCZOS), (margin, top))
        pen.rectangle((margin, top, margin + side - 1, top + side - 1), outline="#9aa5b1", width=1)
        for column in range(columns):
            if gallery.neighbour_rows[row, column] < 0:
                continue
            left = first + column * (side + gap)
            picture = Image.fromarray(gallery.neighbour_images[row, column]).resize((side, side), Image.Resampling.LANCZOS)
            canvas.paste(picture, (left, top))
            outline = RIGHT if correct[row, column] else WRONG
            pen.rectangle((left - frame, top - frame, left + side + frame - 1, top + side + frame - 1), outline=outline, width=frame)
    buffer = io.BytesIO()
    canvas.save(buffer, "png", optimize=True)
    return buffer.getvalue()
