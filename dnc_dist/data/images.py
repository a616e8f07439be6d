"""Image bytes to RGB pixels, and to the one form in which shards store images."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image, ImageOps

JPEG_QUALITY = 95
# What Pillow raises for damaged bytes. TypeError, AttributeError and the like are bugs and are never caught.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB pixels; transparent ones are laid on white, 16-bit grey is scaled to 8 bit."""
    if "exif" in image.info or "xmp" in image.info or image.format != "JPEG":
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, layer).convert("RGB")
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda value: value / 257.0).convert("L").convert("RGB")
    return image.convert("RGB")


def decode(data: bytes) -> Image.Image:
    """The RGB pixels of an encoded image, turned as its EXIF orientation says.

    Raises:
        One of DECODE_ERRORS: the bytes are no complete image.
    """
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return _to_rgb(image)


def encode(image: Image.Image, quality: int = JPEG_QUALITY) -> bytes:
    """A JPEG without metadata and without colour subsampling; the same bytes for the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def normalise(data: bytes, max_side: int | None = None, box: tuple[int, int, int, int] | None = None) -> bytes:
    """The image as shards hold it: an upright RGB JPEG, the original bytes where they already are one.

    Args:
        data: the file's bytes, any format that Pillow reads.
        max_side: larger images are shrunk to this longer side.
        box: (left, top, right, bottom) in pixels of the upright image; everything else is cut away.

    Raises:
        One of DECODE_ERRORS: the bytes are no complete image, or the box is empty or outside.
    """
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        kept = image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1
        pixels = _to_rgb(image)
    if box is not None:
        left, top, right, bottom = box
        box = (max(left, 0), max(top, 0), min(right, pixels.width), min(bottom, pixels.height))
        if box[0] >= box[2] or box[1] >= box[3]:
            raise ValueError(f"box {left, top, right, bottom} holds no pixel of a {pixels.width}x{pixels.height} image")
        kept = kept and box == (0, 0, *pixels.size)
        pixels = pixels.crop(box)
    if max_side is not None and max(pixels.size) > max_side:
        kept = False
        share = max_side / max(pixels.size)
        pixels = pixels.resize((max(1, round(pixels.width * share)), max(1, round(pixels.height * share))), Image.Resampling.LANCZOS)
    return data if kept else encode(pixels)
