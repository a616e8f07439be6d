"""The pixels of an image as Pillow holds them, four bytes each: taken in and given out without a copy where that can be."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


def to_image(pixels: NDArray[np.uint8]) -> Image.Image:
    """The RGB image of an array (H, W, 4) whose fourth byte means nothing. It keeps the array, which must not change any more."""
    height, width, _ = pixels.shape
    return Image.fromarrow(pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 4), "RGB", (width, height))


def pixels_of(image: Image.Image) -> Tensor:
    """(H, W, 4) uint8 of an RGB image; the fourth byte means nothing. To be read only: it may be the image's own memory."""
    try:
        flat = torch.from_dlpack(pa.array(image).values)
    except ValueError:  # Pillow keeps an image of more than 16 MB in several pieces
        flat = torch.frombuffer(bytearray(image.tobytes("raw", "RGBX")), dtype=torch.uint8)
    return flat.view(image.height, image.width, 4)
