"""Pictures for trackers, as arrays of pixels (height, width, 3) uint8."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from dnc_dist.report.gallery import gallery_image
from dnc_dist.rundir.gallery import PictureGallery

_INK, _GRID = "#1f2933", "#d5dae0"
_CELL, _TEXT_WIDTH, _PADDING = 64, 150, 6
MOST_ROWS = 40
"""Of a table that is drawn."""


def neighbour_sheet(gallery: PictureGallery) -> np.ndarray:
    """Queries with their nearest neighbours, right ones framed green, wrong ones red."""
    return np.asarray(Image.open(io.BytesIO(gallery_image(gallery, queries=len(gallery.query_rows), side=_CELL))).convert("RGB"))


def heat_map(masks: np.ndarray) -> np.ndarray:
    """Masks (k, D) of at least 0: a row for each learner, a column for each coordinate, the darker the larger."""
    learners, dimension = masks.shape
    figure = Figure(figsize=(9, min(12.0, 1.4 + 0.32 * learners)), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # At most one column for each pixel: of 65,536 coordinates neighbours are drawn over each other.
    image = axes.imshow(masks, cmap="Blues", vmin=0, vmax=max(float(masks.max()), 1e-9), aspect="auto", interpolation="nearest")
    axes.set_xlabel(f"coordinate of the embedding (of {dimension})")
    axes.set_ylabel("learner")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(learners, 16)))
    axes.set_yticks(np.arange(learners + 1) - 0.5, minor=True)
    axes.grid(which="minor", axis="y", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    figure.colorbar(image, ax=axes, label="weight", fraction=0.04, pad=0.01)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def scatter_image(points: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Points (n, 2): blue where the nearest image is of the same class, red where it is not."""
    figure = Figure(figsize=(7, 6), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(xticks=[], yticks=[], aspect="equal")
    for chosen, colour, label in ((right, "#2563eb", "nearest image is right"), (~right, "#dc2626", "nearest image is of another class")):
        axes.scatter(
            points[chosen, 0], points[chosen, 1], s=14, color=colour, alpha=0.7, linewidths=0, label=f"{label} ({int(chosen.sum())})"
        )
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def beside(pictures: Sequence[np.ndarray], *, apart: int = 0) -> np.ndarray:
    """Pictures (side, side, 3) side by side; ``apart``: a gap after so many of them."""
    parts: list[np.ndarray] = []
    for number, picture in enumerate(pictures):
        wide = apart and number and number % apart == 0
        if number:
            parts.append(np.full((len(picture), 12 if wide else 2, 3), 255, np.uint8))
        parts.append(picture)
    return np.concatenate(parts, axis=1)


def table_image(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> np.ndarray:
    """The first rows of a table as a picture, for where no table can hold pictures."""
    rows = rows[:MOST_ROWS]
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 12)
    widths = []
    for number in range(len(columns)):
        images = [row[number].shape[1] for row in rows if isinstance(row[number], np.ndarray)]
        texts = [font.getlength(_words(row[number])) for row in rows if not isinstance(row[number], np.ndarray)]
        widths.append(int(max([*images, *(min(_TEXT_WIDTH, length) for length in texts), _CELL])) + 2 * _PADDING)
    heads = [_wrapped(name, width - 2 * _PADDING, font) for name, width in zip(columns, widths, strict=True)]
    head = 16 * max(len(lines) for lines in heads) + 2 * _PADDING
    height = _CELL + 2 * _PADDING
    sheet = Image.new("RGB", (sum(widths), head + height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    left = 0
    for number, width in enumerate(widths):
        pen.multiline_text((left + _PADDING, _PADDING), "\n".join(heads[number]), _INK, font, spacing=2)
        for line, row in enumerate(rows):
            top, cell = head + line * height, row[number]
            if isinstance(cell, np.ndarray):
                sheet.paste(Image.fromarray(cell), (left + _PADDING, top + _PADDING))
            else:
                words = _wrapped(_words(cell), width - 2 * _PADDING, font)[:4]
                pen.multiline_text((left + _PADDING, top + _PADDING), "\n".join(words), _INK, font, spacing=2)
        left += width
    for line in range(len(rows) + 1):
        pen.line((0, head + line * height, left, head + line * height), fill=_GRID)
    return np.asarray(sheet)


def _words(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def _wrapped(text: str, width: float, font: ImageFont.FreeTypeFont) -> list[str]:
    """A text in lines of a width in pixels; a long word, such as a path, is broken."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
