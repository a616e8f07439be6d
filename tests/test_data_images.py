"""JPEGs are decoded by simplejpeg where Pillow would give the same pixels, and by Pillow everywhere else: nobody can tell which it was."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from dnc_dist.data import images
from dnc_dist.data.images import DECODE_ERRORS, decode, encode, normalise
from dnc_dist.data.jpeg import plain_size
from dnc_dist.data.loading import load_image
from dnc_dist.data.pixels import pixels_of, to_image
from dnc_dist.data.transforms import Geometry


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth areas, edges and noise."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noise = generator.integers(-20, 21, (height, width, 3))
    pixels = np.asarray(coarse).astype(int) + noise * (np.arange(width) % 7 < 3)[None, :, None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> Image.Image | str:
    """What Pillow alone says: the pixels, or the kind of error."""
    try:
        return images._to_rgb(*images._load(data)[:2])
    except DECODE_ERRORS as error:
        return type(error).__name__


def assert_as_pillow(data: bytes) -> bool:
    """The same pixels or the same error; whether there are pixels."""
    expected = by_pillow(data)
    if isinstance(expected, str):
        with pytest.raises(DECODE_ERRORS) as caught:
            decode(data)
        assert caught.type.__name__ == expected
        return False
    found = decode(data)
    assert (found.mode, found.size) == ("RGB", expected.size)
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    return True


SIZES = [(1, 1), (2, 1), (1, 9), (7, 7), (8, 8), (9, 8), (15, 17), (16, 16), (17, 31), (33, 5), (64, 64), (101, 67), (250, 187)]


def plain_files() -> Iterator[bytes]:
    for seed, size in enumerate(SIZES):
        image = picture(*size, seed)
        pixels = np.ascontiguousarray(np.asarray(image))
        for subsampling in ("444", "422", "420", "440", "411"):
            yield simplejpeg.encode_jpeg(pixels, quality=60 + 3 * seed, colorsubsampling=subsampling)
        for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
            yield encode(image, 95 - 5 * seed, subsampling)
            yield normalise(saved(image, progressive=True, quality=80, subsampling=subsampling))
        yield saved(image, optimize=True, restart_marker_blocks=3)
        yield saved(image, keep_rgb=True)  # Adobe's segment says that the colours are no YCbCr


def test_pixels_are_those_of_pillow_to_the_last_bit() -> None:
    files = list(plain_files())
    assert len(files) == len(SIZES) * 13
    for data in files:
        assert images._decode_plain(data) is not None, "this one should not need Pillow"
        assert assert_as_pillow(data)


def with_exif(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, exif=exif)


OTHERS = {
    "grey": lambda image: saved(image.convert("L")),
    "CMYK": lambda image: saved(image.convert("CMYK")),
    "lying on its side": lambda image: with_exif(image, 6),
    "upright, but EXIF says so": lambda image: with_exif(image, 1),
    "comment": lambda image: saved(image, comment=b"x"),
    "profile": lambda image: saved(image, icc_profile=bytes(100)),
    "PNG": lambda image: saved(image, "PNG"),
    "16 bit": lambda image: saved(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"),
    "transparent": lambda image: saved(image.convert("RGBA"), "PNG"),
    "palette": lambda image: saved(image.convert("P"), "GIF"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_is_left_to_pillow(name: str) -> None:
    data = OTHERS[name](picture(30, 20))
    assert images._decode_plain(data) is None
    assert assert_as_pillow(data)
    assert plain_size(normalise(data)) == decode(data).size  # as it lies in a shard


def test_an_image_that_pillow_finds_too_large_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(picture(40, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)  # an error from twice as many on
    assert not assert_as_pillow(data)
    assert plain_size(data) == (40, 30)


def test_a_process_that_is_short_of_memory_leaves_no_image_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else Pillow raises, over a damaged file, is a reason to."""
    data, raised = saved(picture(8, 8), "PNG"), [MemoryError, RecursionError, TypeError]

    def fail(*told: object) -> None:
        raise raised[0]

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(MemoryError):
        load_image(data, Geometry(None, 8), None)
    while len(raised) > 1:
        del raised[0]
        assert load_image(data, Geometry(None, 8), None) is None


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:2:0", "restart_marker_blocks": 2}])
def test_damaged_files_have_the_same_fate(options: dict[str, Any]) -> None:
    """Cut at every place, or with one byte replaced: read or refused as Pillow does, with its pixels."""
    whole = normalise(saved(picture(40, 24), quality=70, **options))
    fates = [assert_as_pillow(whole[:end]) for end in range(0, len(whole), 3)]
    assert not any(fates[: len(fates) // 2]), "half a file is no image"
    generator = np.random.default_rng(0)
    fates = []
    for at in generator.integers(0, len(whole), 400):
        damaged = bytearray(whole)
        damaged[at] ^= int(generator.integers(1, 256))
        fates.append(assert_as_pillow(bytes(damaged)))
    assert any(fates) and not all(fates)


def test_without_simplejpeg_pixels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(picture(50, 41))
    fast = np.asarray(decode(data))
    monkeypatch.setattr(images, "simplejpeg", None)
    assert np.array_equal(np.asarray(decode(data)), fast)


def test_pixels_come_and_go_without_a_copy() -> None:
    array = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
    image = to_image(array)
    assert (image.mode, image.size) == ("RGB", (9, 6))
    assert np.array_equal(np.asarray(image), array[:, :, :3])
    assert pixels_of(image).data_ptr() == array.ctypes.data
    del array
    assert torch.equal(pixels_of(image)[:, :, :3], torch.from_numpy(np.array(image)))
    image.putpixel((0, 0), (1, 2, 3))  # what changes an image gets a copy of it
    assert image.getpixel((0, 0)) == (1, 2, 3)


def test_an_image_in_several_pieces_is_copied() -> None:
    large = Image.new("RGB", (3000, 2000), (1, 2, 3))  # 24 MB
    large.putpixel((2999, 1999), (7, 8, 9))
    pixels = pixels_of(large)
    assert pixels.shape == (2000, 3000, 4)
    assert pixels[0, 0, :3].tolist() == [1, 2, 3] and pixels[-1, -1, :3].tolist() == [7, 8, 9]
