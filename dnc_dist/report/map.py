"""A map of the embedding: queries as points in a plane, with their pictures; styles alone show them, no script."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dnc_dist.report import names
from dnc_dist.report.course import Stop
from dnc_dist.report.markup import Html, element, join
from dnc_dist.report.pictures import data_url
from dnc_dist.rundir.diagnosis import Diagnosis

_COLUMNS = 40
"""Pictures beside each other on the sheet."""
_ALWAYS = 120
_APART = 0.045
"""Of the map's width, between pictures that are always shown."""
_MARGIN = 0.03


def map_html(found: Diagnosis, course: list[Stop], damaged: list[str]) -> Html:
    """The map with its words; nothing without points.

    Args:
        found: whose images are shown.
        course: the maps of several evaluations, that of the diagnosis last; a choice among them stands above the map if they are several.
        damaged: what is wrong with files of maps.
    """
    count = len(found.map_points)
    if count < 3:
        return Html()
    places = _positions([stop.points for stop in course])
    last = _spread(places[-1], range(count))
    # What has its picture in the last map has it in the others, too, where there is room.
    pictured = [set(_spread(at, [*last, *range(count)])) for at in places[:-1]] + [set(last)]
    side = found.map_images.shape[1]
    classes: dict[str, list[Html]] = {}
    for number in range(count):
        style = [f"--x:{-(number % _COLUMNS) * side}px;--y:{-(number // _COLUMNS) * side}px"]
        for stop, (at, big) in enumerate(zip(places, pictured, strict=True)):
            # Without a number: what shows without a choice, and on paper.
            name = "" if stop == len(places) - 1 else str(stop + 1)
            if np.isfinite(at[number]).all():
                x, y = (100 * at[number]).tolist()
                style.append(f"--l{name}:{x:.1f}%;--t{name}:{100 - y:.1f}%" + (f";--b{name}:1" if number in big else ""))
        point = element("i", style=";".join(style), cls="" if found.map_right[number] else "off")
        classes.setdefault(str(found.map_names[number]), []).append(point)
    points = [
        element("label", element("input", type="checkbox"), *of_class, title=names.shown(name)[:60]) for name, of_class in classes.items()
    ]
    sheet = data_url(_sheet(found.map_images))
    canvas = element("div", *points, cls="map", style=f"--sheet:url({sheet});--side:{side}px")
    parts = [element("h2", "Map of the embedding"), element("p", _words(found, len(course)), cls="note")]
    if damaged:
        parts.append(element("p", "Left out: ", "; ".join(damaged), cls="note"))
    return join([*parts, element("div", *_choice(course), canvas, cls="course")])


def _words(found: Diagnosis, stops: int) -> str:
    colours = "blue if the nearest image is right, red if it is wrong" if found.counts[0] else "one for each image"
    said = [
        f"{len(found.map_points):,} test images, drawn at random, along the two directions in which their embeddings differ most; these "
        f"hold {float(found.map_variance.sum()):.0%} of all variance, so that what lies together here may be far apart. Points are "
        f"{colours}. Point at one to see its picture and the others of its class, click to keep them in sight. Some pictures are "
        "always shown."
    ]
    if stops > 1:
        said.append(
            f"The same images at {stops} evaluations, each map along its own two directions, then turned and mirrored, never scaled, so "
            "that its points lie as near as they can to those of the next. Choose one, or step through them with the arrow keys. "
            "Colours are those of the last, which is the one that is printed."
        )
    return " ".join(said)


def _choice(course: list[Stop]) -> list[Html]:
    """A choice among the maps: inputs, which styles hide, and their labels in a row."""
    if len(course) < 2:
        return []
    inputs, labels = [], []
    for number, stop in enumerate(course, 1):
        checked = {"checked": "checked"} if number == len(course) else {}
        recall = f"recall@1 {stop.recall:.1%}" if stop.recall is not None else ""
        facts = [words for words in (stop.trained, recall, f"{stop.variance:.0%} of variance") if words]
        inputs.append(element("input", type="radio", name="map", id=f"map-{number}", **checked))
        small = element("small", *(element("span", words) for words in facts))
        labels.append(element("label", element("b", element("em", "epoch "), str(stop.epoch)), small, **{"for": f"map-{number}"}))
    return [*inputs, element("div", *labels, cls="stops")]


def _positions(maps: list[np.ndarray]) -> list[np.ndarray]:
    """(n, 2) in the unit square for each map (n, 2), all axes alike; one outlier must not press all others together."""
    low = np.min([np.nanquantile(points, 0.005, axis=0) for points in maps], axis=0)
    high = np.max([np.nanquantile(points, 0.995, axis=0) for points in maps], axis=0)
    middle, reach = (low + high) / 2, max(float((high - low).max()) / 2, np.finfo(np.float32).tiny)
    return [np.clip(0.5 + (0.5 - _MARGIN) * (points - middle) / reach, _MARGIN / 2, 1 - _MARGIN / 2) for points in maps]


def _spread(at: np.ndarray, order: Iterable[int]) -> list[int]:
    """Points that are apart from each other, of those that compete the first in the order."""
    chosen: list[int] = []
    for number in order:
        # The map is half as high as it is wide.
        apart = not chosen or (np.abs((at[chosen] - at[number]) * [1, 0.5]).max(1) >= _APART).all()
        if len(chosen) < _ALWAYS and apart and np.isfinite(at[number]).all():
            chosen.append(number)
    return chosen


def _sheet(images: np.ndarray) -> np.ndarray:
    """All pictures (n, side, side, 3) on one sheet, line by line."""
    count, side = images.shape[:2]
    lines = -(-count // _COLUMNS)
    sheet = np.full((lines * _COLUMNS, side, side, 3), 255, np.uint8)
    sheet[:count] = images
    return sheet.reshape(lines, _COLUMNS, side, side, 3).swapaxes(1, 2).reshape(lines * side, _COLUMNS * side, 3)
