"""Images as somebody gives them to a program: paths, folders, PIL images, arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dnc_dist.base.errors import InputError
from dnc_dist.data.images import decode, upright_rgb
from dnc_dist.data.listing import FileImages, list_images

Decoded = Callable[[], Image.Image]
"""Gives the pixels of an image."""
_ALLOWED = "give paths, PIL images or arrays (H, W, 3) of uint8"


def each_image(images: Any) -> Iterable[Any]:
    """The single images that somebody may mean by ``images``.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(images, str | os.PathLike):
        path = Path(images)
        if not path.is_dir():
            return [path]
        listed = list_images(path)
        if not isinstance(listed, FileImages):
            raise InputError(f"{path} is a prepared data set; `dnc-dist embed` embeds one, or give a folder of images")
        return listed.files
    if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim != 4):
        return [images]
    if isinstance(images, np.ndarray | Sequence):
        return images
    if isinstance(images, Iterable) and not isinstance(images, Tensor | bytes):
        return images
    raise InputError(f"{type(images).__name__} is no image; {_ALLOWED}")


def decoded(one: Any, name: str) -> Decoded:
    """What gives the pixels of an image.

    Raises:
        InputError: it is none.
    """
    if isinstance(one, str | os.PathLike):
        (reader,) = FileImages([name], [os.fspath(one)], [None]).readers(0, 1)
        return partial(read, reader)
    if isinstance(one, Image.Image):
        return partial(upright_rgb, one)
    if isinstance(one, np.ndarray) and one.dtype == np.uint8 and one.ndim == 3 and one.shape[2] == 3 and one.size:
        return partial(Image.fromarray, one)
    what = f"an array {one.shape} of {one.dtype}" if isinstance(one, np.ndarray) else type(one).__name__
    raise InputError(f"{name} is {what}; {_ALLOWED}")


def read(reader: Callable[[], bytes]) -> Image.Image:
    """The image of the encoded bytes that the reader gives."""
    return decode(reader())
