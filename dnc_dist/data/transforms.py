"""Image geometry in the loader's workers, pixel augmentation on the device; both driven by given uniform numbers, never by a state.

Row i of a result depends on its own image and its own uniforms alone, so that pixels are the same on any number of ranks.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

AugmentKind = Literal["none", "light", "standard", "color", "geom", "geom_color"]
AUGMENT_KINDS: tuple[str, ...] = get_args(AugmentKind)
CROP_UNIFORMS = 25  # ten tries of area and aspect ratio, x, y, flip, two for a rotation
_RATIO = (3 / 4, 4 / 3)
_AREA = (0.2, 1.0)
_MAX_DEGREES = 45.0
Box = tuple[float, float, float, float]


def evaluation_box(width: int, height: int, crop: float) -> Box:
    """The centred square whose side is ``crop`` times the shorter side (resize and centre crop in one step)."""
    side = min(width, height) * crop
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _resized_crop_box(width: int, height: int, u: list[float]) -> Box:
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


def _light_box(width: int, height: int, crop: float, u: list[float]) -> Box:
    """The evaluation square, 10 % larger or smaller and shifted by up to 8 % of its side; it may reach beyond the image."""
    left, top, right, _ = evaluation_box(width, height, crop)
    side = right - left
    new = side * (0.9 + 0.2 * u[0])
    x = left + (side - new) / 2 + side * 0.16 * (u[20] - 0.5)
    y = top + (side - new) / 2 + side * 0.16 * (u[21] - 0.5)
    return x, y, x + new, y + new


def _resize(image: Image.Image, box: Box, size: int) -> Image.Image:
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


def _rotate(image: Image.Image, u: list[float]) -> Image.Image:
    """With probability 1/2 a rotation by up to 45 degrees, the corners filled with the image's mean colour."""
    if u[23] >= 0.5:
        return image
    fill = tuple(int(value) for value in np.asarray(image).mean((0, 1)))
    return image.rotate((2 * u[24] - 1) * _MAX_DEGREES, Image.Resampling.BILINEAR, fillcolor=fill)


class Geometry:
    """Decoded image to (3, size, size) uint8; ``none`` is the evaluation transform.

    ``standard``: random resized crop and flip; ``light``: small shifts and scales without a flip, for characters and other things that
    have a left and a right; ``color``, ``geom``, ``geom_color``: the geometry of the published augmentations.
    """

    def __init__(self, kind: AugmentKind, image_size: int, crop: float = 1.0) -> None:
        self.kind, self.image_size, self.crop = kind, image_size, crop

    def __call__(self, image: Image.Image, uniforms: Tensor | None = None) -> Tensor:
        """Transform one RGB image with (CROP_UNIFORMS,) numbers; ``none`` needs none."""
        if self.kind == "none" or uniforms is None:
            return to_tensor(_resize(image, evaluation_box(*image.size, self.crop), self.image_size))
        u = uniforms.tolist()
        if self.kind == "light":
            return to_tensor(_resize(image, _light_box(*image.size, self.crop, u), self.image_size))
        if self.kind == "geom":
            image = _rotate(image, u)
        image = _resize(image, _resized_crop_box(*image.size, u), self.image_size)
        if u[22] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.kind == "geom_color":
            image = _rotate(image, u)
        return to_tensor(image)


def to_tensor(image: Image.Image) -> Tensor:
    """(3, height, width) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _saturate_and_turn(saturation: Tensor, hue: Tensor, to_yiq: Tensor, from_yiq: Tensor) -> Tensor:
    """(B, 3, 3) colour matrices: saturation about the grey value, then a rotation of the hue about the grey axis.

    Args:
        saturation: (B,) 0 is grey, 1 the image.
        hue: (B,) in turns.
        to_yiq: (3, 3), and its inverse.
    """
    angle = hue * (2 * math.pi)
    cos, sin, zero = torch.cos(angle) * saturation, torch.sin(angle) * saturation, torch.zeros_like(saturation)
    rows = [torch.stack([zero + 1, zero, zero], -1), torch.stack([zero, cos, -sin], -1), torch.stack([zero, sin, cos], -1)]
    # (A R B) written out: a batched matrix product may round differently for another number of rows.
    turn = torch.stack(rows, -2)  # (B, 3, 3)
    inner = (turn[:, :, :, None] * to_yiq[None, None]).sum(2)
    return (from_yiq[None, :, :, None] * inner[:, None]).sum(2)


class Augment(nn.Module):
    """Pixels on the device: (B, 3, H, W) uint8 to normalised float32, with the pixel part of the augmentation while training.

    ``color``: brightness, contrast, saturation 0.4 and hue 0.1 with probability 0.8, grey with 0.2; ``geom``: up to five holes of
    40/224 and a box blur, each with 1/2; ``geom_color``: brightness and contrast 0.2 with 1/2, holes and blur. Contrast pivots on
    the image's own mean grey value; all colour changes are one affine map per image, clamped once.
    """

    num_uniforms = 20

    def __init__(self, kind: AugmentKind, mean: tuple[float, ...] = (0.5, 0.5, 0.5), std: tuple[float, ...] = (0.25, 0.25, 0.25)) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        # Brightness and two colour coordinates: saturation and hue act on the latter.
        to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
        self.register_buffer("to_yiq", to_yiq, persistent=False)
        self.register_buffer("from_yiq", torch.linalg.inv(to_yiq), persistent=False)
        self.to_yiq: Tensor
        self.from_yiq: Tensor
        self.mean: Tensor
        self.std: Tensor

    @property
    def uses_uniforms(self) -> bool:
        """Whether training needs uniform numbers."""
        return self.kind in ("color", "geom", "geom_color")

    def forward(self, images: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) float32.

        Args:
            images: (B, 3, H, W) uint8.
            uniforms: (B, num_uniforms) in [0, 1); None: no augmentation (evaluation).
        """
        pixels = images.float() / 255
        if uniforms is not None and self.uses_uniforms:
            uniforms = uniforms.to(pixels.device)
            if self.kind in ("color", "geom_color"):
                pixels = self._color(pixels, images, uniforms)
            if self.kind in ("geom", "geom_color"):
                pixels = self._blur(self._holes(pixels, uniforms), uniforms)
        return (pixels - self.mean) / self.std

    def _color(self, pixels: Tensor, images: Tensor, u: Tensor) -> Tensor:
        strong = self.kind == "color"
        spread = 0.4 if strong else 0.2
        on = (u[:, 0] < (0.8 if strong else 0.5)).float()
        brightness, contrast = (1 + on * spread * (2 * u[:, at] - 1) for at in (1, 2))
        saturation, hue = torch.ones_like(on), torch.zeros_like(on)
        if strong:
            saturation = (1 + on * spread * (2 * u[:, 3] - 1)) * (u[:, 5] >= 0.2).float()
            hue = on * 0.1 * (2 * u[:, 4] - 1)
        # Integer sums are exact, so the mean does not depend on how a reduction is split.
        sums = images.to(torch.int32).sum((2, 3)).float() / (255 * images.shape[2] * images.shape[3])
        grey = (0.299 * sums[:, 0] + 0.587 * sums[:, 1] + 0.114 * sums[:, 2]) * brightness
        scale = (brightness * contrast)[:, None, None] * _saturate_and_turn(saturation, hue, self.to_yiq, self.from_yiq)  # (B, 3, 3)
        shift = (grey * (1 - contrast))[:, None, None]
        channels = [
            sum((scale[:, c, d, None, None] * pixels[:, d] for d in range(1, 3)), scale[:, c, 0, None, None] * pixels[:, 0]) + shift
            for c in range(3)
        ]
        return torch.stack(channels, 1).clamp(0, 1)

    def _holes(self, pixels: Tensor, u: Tensor) -> Tensor:
        height, width = pixels.shape[2:]
        side = max(1, round(width * 40 / 224))
        count = torch.where(u[:, 6] < 0.5, torch.floor(u[:, 7] * 5) + 1, 0.0)
        hidden = torch.zeros(len(pixels), height, width, dtype=torch.bool, device=pixels.device)
        y, x = torch.arange(height, device=pixels.device), torch.arange(width, device=pixels.device)
        for hole in range(5):
            top = torch.floor(u[:, 8 + hole] * max(1, height - side + 1))[:, None]
            left = torch.floor(u[:, 13 + hole] * max(1, width - side + 1))[:, None]
            inside_y, inside_x = (y >= top) & (y < top + side), (x >= left) & (x < left + side)
            hidden |= inside_y[:, :, None] & inside_x[:, None, :] & (hole < count)[:, None, None]
        return pixels.masked_fill(hidden[:, None], 0.0)

    def _blur(self, pixels: Tensor, u: Tensor) -> Tensor:
        on, choice = (u[:, 18] < 0.5)[:, None, None, None], torch.floor(u[:, 19] * 3)[:, None, None, None]
        result = pixels
        for number, size in enumerate((3, 5, 7)):
            padded = functional.pad(pixels, [size // 2] * 4, mode="replicate")
            result = torch.where(on & (choice == number), functional.avg_pool2d(padded, size, stride=1), result)
        return result
