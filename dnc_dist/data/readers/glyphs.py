"""Reader without a download: characters drawn with the typefaces that matplotlib ships; classes are code points, samples typefaces."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.base.rng import numpy_generator
from dnc_dist.data.images import encode
from dnc_dist.data.index import hashed_share
from dnc_dist.data.readers import TEST, TRAIN, Reader, Reading, Sample, plain

MIN_FACES = 10  # a code point is a candidate if this many typefaces have it
MIN_DRAWINGS = 5  # and a class if this many of them draw it differently
MAX_SAMPLES = 10
_SUFFIXES = {".ttf", ".otf"}
_SCALE = 2  # glyphs are drawn larger, so that turning and shrinking them blurs little
_NOT_DEFINED = "\uffff"
# TeX's fonts put other characters at many code points; their letters and digits are where they belong.
_TEX_TEXT = {"cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"}
_UNUSABLE = ("LastResort", "cmex", "cmmi", "cmsy")


@dataclass(frozen=True)
class _Face:
    name: str
    font: ImageFont.FreeTypeFont
    code_points: frozenset[int]
    blank: bytes  # what it draws for a character that it lacks


@dataclass(frozen=True)
class _Drawing:
    face: str
    mask: Image.Image
    digest: bytes


def _shipped() -> list[Path]:
    import matplotlib

    return sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("*.ttf"))


def _load_face(path: Path, size: int) -> _Face:
    from fontTools.ttLib import TTFont

    with TTFont(path, lazy=True) as tables:
        code_points = frozenset(tables.getBestCmap() or ())
    if path.stem in _TEX_TEXT:
        code_points &= frozenset(ord(c) for c in "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    font = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    return _Face(path.stem, font, code_points, _draw(font, _NOT_DEFINED)[1])


def _faces(fonts: Path | None, size: int) -> tuple[list[_Face], list[str]]:
    """The typefaces in the order of their names, and the files that are none."""
    from fontTools.ttLib import TTLibError

    paths = [path for path in _shipped() if not path.name.startswith(_UNUSABLE)]
    if fonts is not None:
        if not fonts.is_dir():
            raise InputError(f"--fonts {fonts} is no folder; give one with .ttf or .otf files, or leave it out")
        added = sorted(path for path in fonts.rglob("*") if path.suffix.lower() in _SUFFIXES and not path.name.startswith("."))
        if not added:
            raise InputError(f"--fonts {fonts} holds no .ttf or .otf file")
        paths += added
    faces: dict[str, _Face] = {}
    damaged = []
    for path in paths:
        try:
            face = _load_face(path, size)
        except (OSError, TTLibError, ValueError, KeyError) as error:
            damaged.append(f"{path.name} ({error})")
        else:
            faces.setdefault(face.name, face)
    return [faces[name] for name in sorted(faces)], damaged


def _draw(font: ImageFont.FreeTypeFont, character: str) -> tuple[Image.Image | None, bytes]:
    """The mask of a character, cut to its ink (None: blank), and its digest."""
    left, top, right, bottom = (round(bound) for bound in font.getbbox(character))
    if left >= right or top >= bottom:
        return None, b""
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), character, fill=255, font=font)
    if (box := mask.getbbox()) is None:
        return None, b""
    mask = mask.crop(box)
    return mask, hashlib.blake2b(mask.tobytes(), digest_size=12, salt=repr(mask.size).encode()[:16]).digest()


def _drawings(code_point: int, faces: list[_Face], least: int) -> list[_Drawing]:
    """The different drawings of a character that are neither blank, nor tiny, nor the sign for a missing character."""
    found: dict[bytes, _Drawing] = {}
    for face in faces:
        if code_point in face.code_points:
            mask, digest = _draw(face.font, chr(code_point))
            if mask is not None and max(mask.size) >= least and digest != face.blank:
                found.setdefault(digest, _Drawing(face.name, mask, digest))
    return list(found.values())


def _render(drawing: _Drawing, size: int, generator: np.random.Generator) -> bytes:
    """The drawing on a plain ground, a little turned, scaled and shifted, in random grey levels (dark on light or light on dark)."""
    turn, scale, x, y, dark, light, inverted = generator.random(7)
    mask = drawing.mask.rotate((2 * turn - 1) * 7, Image.Resampling.BILINEAR, expand=True)
    factor = min((0.85 + 0.3 * scale) / _SCALE, 0.92 * size / max(mask.size))
    width, height = (max(1, round(side * factor)) for side in mask.size)
    mask = mask.resize((width, height), Image.Resampling.BOX if factor > 0.9 else Image.Resampling.BILINEAR)
    left = round((size - width) / 2 + (2 * x - 1) * min(0.06 * size, (size - width) / 2))
    top = round((size - height) / 2 + (2 * y - 1) * min(0.06 * size, (size - height) / 2))
    ink, ground = int(100 * dark), int(155 + 100 * light)
    if inverted < 0.25:
        ink, ground = ground, ink
    canvas = Image.new("L", (size, size), ground)
    canvas.paste(ink, (left, top), mask)
    return encode(canvas.convert("RGB"), quality=90)


def _code_points(faces: list[_Face]) -> list[int]:
    """Visible, free-standing characters that enough typefaces have."""
    counts: dict[int, int] = {}
    for face in faces:
        for code_point in face.code_points:
            counts[code_point] = counts.get(code_point, 0) + 1
    return sorted(at for at, count in counts.items() if count >= MIN_FACES and unicodedata.category(chr(at))[0] not in "CMZ")


class GlyphsReader(Reader):
    """Characters drawn with the typefaces that matplotlib ships; no download.

    Every character that at least 10 typefaces have; half of the classes, by a seeded hash, are the test split.
    """

    class Options(parts.Options):
        fonts: Path | None = None
        """A folder of further .ttf and .otf typefaces."""
        classes: int | None = Field(None, ge=4)
        """At most this many characters."""
        image_size: int = Field(64, ge=16, le=512)
        """Side of the images, pixels."""

    source = ""

    def read(self, root: Path | None, *, seed: int, progress: Callable[[int, int], None] | None) -> Reading:
        return _read(self.options.fonts, self.options.classes, self.options.image_size, seed, progress)


def _read(fonts: Path | None, classes: int | None, image_size: int, seed: int, progress: Callable[[int, int], None] | None) -> Reading:
    """Draw the characters.

    A character that some typeface draws exactly like another one (Latin A, Greek Alpha, Cyrillic A) is left out for the one with
    the lower code point. A class has up to 10 samples: different drawings, chosen by the seed.

    Raises:
        InputError: ``fonts`` is no folder with typefaces, or too few classes remain.
    """
    size = round(0.75 * image_size) * _SCALE
    faces, damaged = _faces(fonts, size)
    kept: dict[int, list[_Drawing]] = {}
    taken: set[tuple[str, bytes]] = set()
    for code_point in _code_points(faces):
        drawings = _drawings(code_point, faces, least=image_size // 10 * _SCALE)
        marks = {(drawing.face, drawing.digest) for drawing in drawings}
        if len(drawings) >= MIN_DRAWINGS and not marks & taken:
            kept[code_point] = drawings
            taken |= marks
    if classes is not None and classes < len(kept):
        chosen = hashed_share([str(at) for at in kept], classes / len(kept), seed, "classes")
        kept = {at: drawings for at, drawings in kept.items() if str(at) in chosen}
    test = hashed_share([str(at) for at in kept], 0.5, seed, "split")

    def samples_of(code_point: int) -> list[Sample]:
        drawings = kept[code_point]
        order = numpy_generator(seed, "faces", code_point).permutation(len(drawings))[:MAX_SAMPLES]
        name = f"u{code_point:04x}"
        split = TEST if str(code_point) in test else TRAIN
        return [
            Sample(name, split, f"{name}/{drawing.face}", data=_render(drawing, image_size, numpy_generator(seed, name, drawing.face)))
            for drawing in (drawings[at] for at in sorted(order))
        ]

    samples: list[Sample] = []
    for done, code_point in enumerate(kept, start=1):
        samples += samples_of(code_point)
        if progress:
            progress(done, len(kept))
    notes = [f"{len(faces)} typefaces; {len(kept)} characters; half of them, by a hash with --seed {seed}, are the test split"]
    if damaged:
        notes.append(f"typefaces that cannot be read: {', '.join(damaged)}")
    options: dict[str, str | int | float | None] = {"classes": classes, "image_size": image_size, "seed": seed}
    return Reading("glyphs", samples, {**options, "fonts": plain(os.path.realpath(fonts)) if fonts else None}, notes)
