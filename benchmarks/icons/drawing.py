"""Drawings: an icon's SVG as a picture in two colours, and which of them are the same drawing."""

from __future__ import annotations

import colorsys
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dnc_dist.base.errors import RunError
from dnc_dist.base.rng import numpy_generator

_CONTRAST = 3.0  # the least that guidelines for legible graphics ask for
_SIDE = 24  # of the pictures that are compared


@dataclass(frozen=True, slots=True)
class Drawing:
    """One icon: its family, its name there, and its picture as SVG without the enclosing element."""

    family: str
    name: str
    body: str
    view_box: tuple[float, float, float, float]

    def svg(self, size: int, ink: str, ground: str) -> str:
        """The whole SVG, square and `size` pixels wide, in two colours (#rrggbb)."""
        left, top, width, height = self.view_box
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{size}" height="{size}" '
            f'viewBox="{left:g} {top:g} {width:g} {height:g}" color="{ink}"><rect x="{left - width:g}" y="{top - height:g}" '
            f'width="{3 * width:g}" height="{3 * height:g}" fill="{ground}"/>{self.body}</svg>'
        )

    def png(self, size: int, ink: str, ground: str) -> bytes:
        """The picture as a PNG file.

        Raises:
            RunError: the renderer is missing, or it refuses the icon.
        """
        try:
            from resvg_py import svg_to_bytes
        except ImportError:
            raise RunError("icons are drawn by resvg-py; install it: pip install 'dnc-dist[benchmarks]'") from None
        try:
            return bytes(svg_to_bytes(svg_string=self.svg(size, ink, ground), skip_system_fonts=True))
        except ValueError as error:
            raise RunError(f"icon {self.name} of {self.family} cannot be drawn: {error}") from error


def colours(seed: int, family: str, name: str) -> tuple[str, str]:
    """Ink and ground (#rrggbb) of one picture, drawn by its name alone: any two colours of enough contrast.

    They are independent of class and family, so that colour tells nothing, and pictures of one class differ in it.
    """
    random = numpy_generator(seed, "colours", family, name)
    while True:
        ink, ground = (colorsys.hls_to_rgb(hue, light, saturation) for hue, light, saturation in random.random((2, 3)))
        dark, light = sorted((_luminance(ink), _luminance(ground)))
        if (light + 0.05) / (dark + 0.05) >= _CONTRAST:
            return _hexadecimal(ink), _hexadecimal(ground)


def _luminance(colour: tuple[float, float, float]) -> float:
    """Relative luminance of an sRGB colour, as WCAG 2 defines it."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def _hexadecimal(colour: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * value):02x}" for value in colour)


def shape(drawing: Drawing) -> NDArray[np.float32] | None:
    """What is compared (576,): the ink, cut to its bounds and scaled, with mean 0 and norm 1; None: a blank or a full square.

    The product of two shapes is their correlation.
    """
    ink = Image.open(io.BytesIO(drawing.png(2 * _SIDE, "#000000", "#ffffff"))).convert("L").point(lambda value: 255 - value)
    box = ink.getbbox()
    if box is None:
        return None
    ink = ink.crop(box)
    square = Image.new("L", (max(ink.size), max(ink.size)))
    square.paste(ink, ((square.width - ink.width) // 2, (square.height - ink.height) // 2))
    values = np.asarray(square.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32).ravel()
    values = values - values.mean()
    norm = float(np.linalg.norm(values))
    return values / norm if norm > 1 else None


def same(shapes: NDArray[np.float32], least: float, block: int = 2048) -> list[tuple[int, int]]:
    """Pairs (first < second) of rows of shapes (N, S) whose correlation is at least this."""
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(shapes), block):
        first, second = np.nonzero(shapes[start : start + block] @ shapes[start:].T >= least)
        pairs += [(start + a, start + b) for a, b in zip(first.tolist(), second.tolist(), strict=True) if a < b]
    return pairs
