"""The typeface of the pictures that we draw: it has the letters of most alphabets."""

from __future__ import annotations

from pathlib import Path

from PIL import ImageFont


def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)
