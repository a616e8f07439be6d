"""Image bytes to RGB pixels, and to the one form in which shards store images."""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import printable
from dnc_dist.data.jpeg import plain_size, without_metadata
from dnc_dist.data.pixels import to_image

try:
    import simplejpeg
except ImportError:  # there are systems without a wheel of it: Pillow decodes to the same pixels, and takes longer
    simplejpeg = None

# What damaged bytes raise. TypeError, AttributeError and the like are bugs of ours and are never caught, but for Pillow's own in ``_load``.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
Image.init()
# No other format is opened, whatever a file is called: some of Pillow's start a program (EPS) or load further files.
FORMATS = tuple(name for name in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN)
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)


@dataclass(frozen=True)
class Form:
    """How images are stored that cannot stay as they are."""

    max_side: int | None = None
    """Larger images are shrunk to this longer side; None keeps every size."""
    quality: int = 95
    """Of JPEG, from 1 to 95."""
    subsampling: Literal["4:4:4", "4:2:0"] = "4:4:4"
    """Of the colours: all of them, or one for four pixels, which is smaller and is decoded faster."""


AS_THEY_ARE = Form()


class _Loaded(NamedTuple):
    """An upright image, the format that it was in, and whether it lay upright there."""

    image: Image.Image
    format: str | None
    was_upright: bool


def _load(data: bytes) -> _Loaded:
    """All that Pillow reads of an encoded image.

    Raises:
        One of DECODE_ERRORS: the bytes are no complete image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            was_upright = image.getexif().get(0x0112, 1) == 1
            marked = "exif" in image.info or "xmp" in image.info or image.format != "JPEG"
            return _Loaded(ImageOps.exif_transpose(image) if marked else image, image.format, was_upright)
    except (*DECODE_ERRORS, MemoryError):  # that is of this process, and says nothing of the image
        raise
    except Exception as error:  # a damaged tag of a TIFF makes Pillow raise anything
        raise ValueError(f"damaged ({error})") from error


def _to_rgb(image: Image.Image, coded: str | None) -> Image.Image:
    """RGB pixels of an image that was in this format; transparent ones are laid on white, grey of more than 8 bits is scaled to 8.

    Raises:
        ValueError: grey values whose range has no meaning.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, layer).convert("RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey(image, coded).convert("RGB")
    return image.convert("RGB")


def _grey(image: Image.Image, coded: str | None) -> Image.Image:
    """8-bit grey. 16-bit values are divided by 257, 32-bit ones of a TIFF too, unless all are at most 255; floats are in [0, 1].

    Raises:
        ValueError: values below 0 or above that, or not finite.
    """
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # false for NaN
            raise ValueError(f"float grey values from {values.min():g} to {values.max():g}; they must be within [0, 1]")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    whole = image.convert("I")
    values = np.asarray(whole)
    least, most = int(values.min()), int(values.max())
    if least < 0 or most > 65535:
        raise ValueError(f"32-bit grey values from {least} to {most}; they must be within [0, 65535]")
    if image.mode == "I" and coded == "TIFF" and most <= 255:
        return whole.convert("L")
    return whole.point(lambda value: value / 257.0).convert("L")


def decode(data: bytes) -> Image.Image:
    """The RGB pixels of an encoded image, turned as its EXIF orientation says.

    Raises:
        One of DECODE_ERRORS: the bytes are no complete image.
    """
    plain = _decode_plain(data)
    if plain is not None:
        return plain
    image, coded, _ = _load(data)
    return _to_rgb(image, coded)


def _decode_plain(data: bytes) -> Image.Image | None:
    """The pixels of a JPEG as shards hold it, the same as Pillow's, in two thirds of the time; None: Pillow has to judge.

    Both use libjpeg-turbo with its exact arithmetic. Whatever makes it warn, such as an end that comes too early, is left to Pillow,
    which accepts some of it and refuses the rest.
    """
    size = plain_size(data)
    if simplejpeg is None or size is None or size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or 0):
        return None
    try:
        return to_image(simplejpeg.decode_jpeg(data, "RGBX", strict=True))
    except ValueError:
        return None


def upright_rgb(image: Image.Image) -> Image.Image:
    """The RGB pixels of an image that somebody has opened or made, as ``decode`` gives those of its file.

    Raises:
        One of DECODE_ERRORS: its file is damaged, or its grey values have no meaning.
    """
    return _to_rgb(ImageOps.exif_transpose(image), image.format)


def encode(image: Image.Image, quality: int = AS_THEY_ARE.quality, subsampling: str = AS_THEY_ARE.subsampling) -> bytes:
    """A JPEG without metadata; the same bytes for the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality, subsampling=subsampling)
    return without_metadata(buffer.getvalue())  # Pillow passes on comments


def normalise(data: bytes, form: Form = AS_THEY_ARE, box: tuple[int, int, int, int] | None = None) -> bytes:
    """The image as shards hold it: an upright RGB JPEG without metadata, the original compressed pixels where they already are one.

    Args:
        data: the file's bytes, any format that Pillow reads.
        form: what an image that has to be encoded anew becomes.
        box: (left, top, right, bottom) in pixels of the upright image; everything else is cut away.

    Raises:
        One of DECODE_ERRORS: the bytes are no complete image, or the box is empty or outside.
    """
    image, coded, was_upright = _load(data)
    kept = coded == "JPEG" and image.mode == "RGB" and was_upright
    pixels = _to_rgb(image, coded)
    if box is not None:
        left, top, right, bottom = box
        box = (max(left, 0), max(top, 0), min(right, pixels.width), min(bottom, pixels.height))
        if box[0] >= box[2] or box[1] >= box[3]:
            raise ValueError(f"box {left, top, right, bottom} holds no pixel of a {pixels.width}x{pixels.height} image")
        kept = kept and box == (0, 0, *pixels.size)
        pixels = pixels.crop(box)
    if form.max_side is not None and max(pixels.size) > form.max_side:
        kept = False
        share = form.max_side / max(pixels.size)
        pixels = pixels.resize((max(1, round(pixels.width * share)), max(1, round(pixels.height * share))), Image.Resampling.LANCZOS)
    try:
        if kept:
            return without_metadata(data)
    except ValueError:  # pixels that can be decoded between segments that cannot be told apart
        pass
    return encode(pixels, form.quality, form.subsampling)


def why_not(error: Exception) -> str:
    """Why an image cannot be read; the same words in every run, without the addresses of objects that Pillow mentions."""
    if isinstance(error, InputError):
        return printable(str(error))
    reason = error.strerror if isinstance(error, OSError) and error.strerror else re.sub(r"\s*<[^>]* at 0x[0-9a-f]+>", "", str(error))
    return f"{type(error).__name__}: {printable(reason)}"
