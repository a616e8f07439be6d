"""Changes of pixels of a batch on its device, from given uniform numbers for each image."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

PIXEL_UNIFORMS = 20
"""Numbers of each image."""


@cache
def _colour_coordinates(device: torch.device) -> tuple[Tensor, Tensor]:
    """(3, 3) from red, green, blue to brightness and two colour coordinates, and its inverse: copied to a device once."""
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    return to_yiq.to(device), torch.linalg.inv(to_yiq).to(device)


def _saturate_and_turn(saturation: Tensor, hue: Tensor) -> Tensor:
    """(B, 3, 3) colour matrices: saturation about the grey value, then a rotation of the hue about the grey axis.

    Args:
        saturation: (B,) 0 is grey, 1 the image.
        hue: (B,) in turns.
    """
    # Brightness and two colour coordinates: saturation and hue act on the latter.
    to_yiq, from_yiq = _colour_coordinates(hue.device)
    angle = hue * (2 * math.pi)
    cos, sin, zero = torch.cos(angle) * saturation, torch.sin(angle) * saturation, torch.zeros_like(saturation)
    rows = [torch.stack([zero + 1, zero, zero], -1), torch.stack([zero, cos, -sin], -1), torch.stack([zero, sin, cos], -1)]
    # (A R B) written out: a batched matrix product may round differently for another number of rows.
    turn = torch.stack(rows, -2)  # (B, 3, 3)
    inner = (turn[:, :, :, None] * to_yiq[None, None]).sum(2)
    return (from_yiq[None, :, :, None] * inner[:, None]).sum(2)


def jitter(pixels: Tensor, images: Tensor, u: Tensor, *, strong: bool) -> Tensor:
    """Brightness and contrast, if ``strong`` also saturation and hue: one affine map of the colours of each image, clamped once.

    Contrast pivots on the image's own mean grey value.

    Args:
        pixels: (B, 3, H, W) in [0, 1].
        images: (B, 3, H, W) uint8, the same.
        u: (B, 20) in [0, 1).
        strong: changes of 0.4 with probability 0.8, grey with 0.2; otherwise of 0.2 with 1/2.
    """
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
    scale = (brightness * contrast)[:, None, None] * _saturate_and_turn(saturation, hue)  # (B, 3, 3)
    shift = (grey * (1 - contrast))[:, None, None]
    channels = [
        sum((scale[:, c, d, None, None] * pixels[:, d] for d in range(1, 3)), scale[:, c, 0, None, None] * pixels[:, 0]) + shift
        for c in range(3)
    ]
    return torch.stack(channels, 1).clamp(0, 1)


def cut_holes(pixels: Tensor, u: Tensor) -> Tensor:
    """(B, 3, H, W), with probability 1/2 up to five black squares of 40/224 of the width in each image."""
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


def blur(pixels: Tensor, u: Tensor) -> Tensor:
    """(B, 3, H, W), with probability 1/2 each image averaged over 3 x 3, 5 x 5 or 7 x 7 pixels."""
    on, choice = (u[:, 18] < 0.5)[:, None, None, None], torch.floor(u[:, 19] * 3)[:, None, None, None]
    result = pixels
    for number, size in enumerate((3, 5, 7)):
        padded = functional.pad(pixels, [size // 2] * 4, mode="replicate")
        result = torch.where(on & (choice == number), functional.avg_pool2d(padded, size, stride=1), result)
    return result
