"""Crops, resizing and rotations of one decoded image, from given uniform numbers."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from torch.nn import functional

from dnc_dist.data.pixels import pixels_of, to_image

CROP_UNIFORMS = 25
"""Ten tries of area and aspect ratio, x, y, flip, two for a rotation."""
_RATIO = (3 / 4, 4 / 3)
_AREA = (0.2, 1.0)
_MAX_DEGREES = 45.0
Box = tuple[float, float, float, float]
Cut = tuple[int, int, int, int]


def evaluation_box(width: int, height: int, crop: float) -> Box:
    """The centred square whose side is ``crop`` times the shorter side (resize and centre crop in one step)."""
    side = min(width, height) * crop
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def resized_crop_box(width: int, height: int, u: list[float]) -> Cut:
    """A random part of the image: area 0.2 to 1, aspect ratio 3/4 to 4/3 (torchvision's RandomResizedCrop)."""
    for attempt in range(10):
        area = width * height * (_AREA[0] + (_AREA[1] - _AREA[0]) * u[2 * attempt])
        ratio = math.exp(math.log(_RATIO[0]) + (math.log(_RATIO[1]) - math.log(_RATIO[0])) * u[2 * attempt + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u[20] * (width - w + 1)), int(u[21] * (height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < _RATIO[0]:
        h = round(width / _RATIO[0])
    elif width / height > _RATIO[1]:
        w = round(height * _RATIO[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resize(image: Image.Image, box: Box, size: int) -> Image.Image:
    """The box at ``size`` x ``size``, antialiased; beyond the image its border pixels go on."""
    left, top, right, bottom = box
    margins = [max(0, math.ceil(m)) for m in (-left, -top, right - image.width, bottom - image.height)]
    if any(margins):
        x0, y0, x1, y1 = margins
        image = Image.fromarray(np.pad(np.asarray(image), ((y0, y1), (x0, x1), (0, 0)), mode="edge"))
        left, top, right, bottom = left + x0, top + y0, right + x0, bottom + y0
    # Rounding may put a bound outside by an ulp, which Pillow refuses.
    box = max(left, 0.0), max(top, 0.0), min(right, float(image.width)), min(bottom, float(image.height))
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def cut_and_resize(image: Image.Image, box: Cut, size: int) -> Image.Image:
    """The box, in whole pixels inside of the image, at ``size`` x ``size``, antialiased: torchvision's ``resized_crop`` of bytes.

    Faster than ``resize``, and not quite the same: at the border of the box that one still sees the pixels outside of it.
    """
    left, top, right, bottom = box
    # A batch of one before its axes are moved: otherwise torch does not see that colours lie innermost, and takes four times as long.
    part = pixels_of(image)[None, top:bottom, left:right].permute(0, 3, 1, 2)
    resized = functional.interpolate(part, (size, size), mode="bilinear", antialias=True)
    return to_image(resized.permute(0, 2, 3, 1)[0].numpy())


def rotate(image: Image.Image, u: list[float]) -> Image.Image:
    """With probability 1/2 a rotation by up to 45 degrees, the corners filled with the image's mean colour."""
    if u[23] >= 0.5:
        return image
    fill = tuple(int(value) for value in np.asarray(image).mean((0, 1)))
    return image.rotate((2 * u[24] - 1) * _MAX_DEGREES, Image.Resampling.BILINEAR, fillcolor=fill)


def crop_and_flip(image: Image.Image, size: int, u: list[float]) -> Image.Image:
    """A random part of the image at ``size`` x ``size``, mirrored with probability 1/2."""
    image = cut_and_resize(image, resized_crop_box(*image.size, u), size)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if u[22] < 0.5 else image
