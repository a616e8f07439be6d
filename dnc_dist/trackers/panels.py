"""Panels: what trackers show beside curves, in a form that belongs to none of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Picture(NamedTuple):
    """An image (height, width, 3) uint8, and what it shows, in words."""

    name: str
    image: np.ndarray
    caption: str


class Histogram(NamedTuple):
    """Counts (b,) between edges (b + 1,)."""

    name: str
    counts: np.ndarray
    edges: np.ndarray
    caption: str


class Table(NamedTuple):
    """Rows of texts, numbers and images (height, width, 3) uint8; None: nothing there."""

    name: str
    columns: list[str]
    rows: list[list[Any]]
    caption: str


class Scatter(NamedTuple):
    """Points (n, 2) with a class each, and whether their nearest image is right."""

    name: str
    points: np.ndarray
    classes: list[str]
    right: np.ndarray
    caption: str


Panel = Picture | Histogram | Table | Scatter
