"""A map of the embedding: queries as points in a plane, with their pictures; styles alone show them, no script."""

from __future__ import annotations

import numpy as np

from dnc_dist.report import names
from dnc_dist.report.markup import Html, element, join
from dnc_dist.report.pictures import data_url
from dnc_dist.rundir.diagnosis import Diagnosis

_COLUMNS = 40
"""Pictures beside each other on the sheet."""
_ALWAYS = 120
_APART = 0.045
"""Of the map's width, between pictures that are always shown."""
_MARGIN = 0.03


def map_html(found: Diagnosis) -> Html:
    """The map with its words; nothing without points."""
    count = len(found.map_points)
    if count < 3:
        return Html()
    asked = bool(found.counts[0])
    at = _positions(found.map_points)
    always = set(_spread(at).tolist())
    side = found.map_images.shape[1]
    points = []
    for number, (x, y) in enumerate(at.tolist()):
        kind = " ".join(word for word, holds in (("off", not found.map_right[number]), ("big", number in always)) if holds)
        place = f"left:{100 * x:.2f}%;top:{100 * (1 - y):.2f}%;--x:{-(number % _COLUMNS) * side}px;--y:{-(number // _COLUMNS) * side}px"
        points.append(element("i", style=place, cls=kind, title=names.shown(str(found.map_names[number]))[:60]))
    colours = "blue if the nearest image is right, red if it is wrong" if asked else "one for each image"
    note = (
        f"{count:,} test images, drawn at random, along the two directions in which their embeddings differ most; these hold "
        f"{float(found.map_variance.sum()):.0%} of all variance, so that what lies together here may be far apart. Points are {colours}. "
        "Point at one to see its picture; some are always shown."
    )
    sheet = data_url(_sheet(found.map_images))
    canvas = element("div", *points, cls="map", style=f"--sheet:url({sheet});--side:{side}px")
    return join([element("h2", "Map of the embedding"), element("p", note, cls="note"), canvas])


def _positions(points: np.ndarray) -> np.ndarray:
    """(n, 2) in the unit square, both axes alike; one outlier must not press all others together."""
    low, high = np.quantile(points, [0.005, 0.995], axis=0)
    middle, reach = (low + high) / 2, max(float((high - low).max()) / 2, np.finfo(np.float32).tiny)
    return np.clip(0.5 + (0.5 - _MARGIN) * (points - middle) / reach, _MARGIN / 2, 1 - _MARGIN / 2)


def _spread(at: np.ndarray) -> np.ndarray:
    """Points that are apart from each other, the first of those that compete."""
    chosen: list[int] = []
    for number, point in enumerate(at):
        # The map is half as high as it is wide.
        if len(chosen) < _ALWAYS and (not chosen or (np.abs((at[chosen] - point) * [1, 0.5]).max(1) >= _APART).all()):
            chosen.append(number)
    return np.array(chosen)


def _sheet(images: np.ndarray) -> np.ndarray:
    """All pictures (n, side, side, 3) on one sheet, line by line."""
    count, side = images.shape[:2]
    lines = -(-count // _COLUMNS)
    sheet = np.full((lines * _COLUMNS, side, side, 3), 255, np.uint8)
    sheet[:count] = images
    return sheet.reshape(lines, _COLUMNS, side, side, 3).swapaxes(1, 2).reshape(lines * side, _COLUMNS * side, 3)
