"""Geometry and pixel augmentation: what they do, and that a row depends on nothing but itself and its numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dnc_dist.base.parts import TABLE
from dnc_dist.base.rng import uniform
from dnc_dist.data.augmentations.geometry import cut_and_resize, resized_crop_box
from dnc_dist.data.transforms import CROP_UNIFORMS, Augment, Geometry, evaluation_box, to_tensor


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind", TABLE["augmentation"])
def test_geometry(kind: str) -> None:
    geometry = Geometry(kind, 16)
    numbers = uniform((0, "crop", 5), torch.arange(20), CROP_UNIFORMS)
    for size in ((40, 30), (9, 50), (16, 16), (3, 3)):
        image = picture(*size)
        results = torch.stack([geometry(image, row) for row in numbers])
        assert (results.shape, results.dtype) == ((20, 3, 16, 16), torch.uint8)
        assert torch.equal(results, torch.stack([geometry(image, row) for row in numbers]))
        assert (len(torch.unique(results, dim=0)) == 1) == (kind == "none")


def test_evaluation_geometry_is_centre_crop() -> None:
    assert evaluation_box(40, 30, 1.0) == (5, 0, 35, 30)
    assert evaluation_box(40, 40, 0.875) == (2.5, 2.5, 37.5, 37.5)
    image = picture(40, 30)
    assert torch.equal(Geometry(None, 30)(image), to_tensor(image.crop((5, 0, 35, 30))))


def test_a_random_crop_is_torchvisions_and_nearly_pillows() -> None:
    """Cut, then resized. Pillow rounds after each of two directions, as torch does, with finer weights: one step of 255 each, at most."""
    from torchvision.transforms.v2 import functional

    # Elsewhere torchvision computes in floats and rounds once; two roundings of a half differ from that by less than two steps.
    same_path = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    generator = np.random.default_rng(0)
    for width, height in ((40, 30), (97, 61), (5, 5), (301, 224)):
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for numbers in uniform((2,), torch.arange(8), CROP_UNIFORMS).tolist():
            box = resized_crop_box(width, height, numbers)
            found = to_tensor(cut_and_resize(image, box, 24))
            left, top, right, bottom = box
            wanted = functional.resized_crop(to_tensor(image), top, left, bottom - top, right - left, [24, 24])
            assert (found.int() - wanted.int()).abs().max() <= (0 if same_path else 1)
            pillow = to_tensor(image.crop(box).resize((24, 24), Image.Resampling.BILINEAR))
            assert (found.int() - pillow.int()).abs().max() <= 2


def test_the_layout_in_memory_changes_no_pixel() -> None:
    numbers = uniform((0, "augment", 7), torch.arange(9), Augment("geom").num_uniforms)
    images = torch.stack([to_tensor(picture(24, 24, seed)).permute(1, 2, 0) for seed in range(9)]).permute(0, 3, 1, 2)
    assert images.is_contiguous(memory_format=torch.channels_last)
    for kind in TABLE["augmentation"]:
        assert torch.equal(Augment(kind)(images, numbers), Augment(kind)(images.contiguous(), numbers))


def test_light_keeps_left_and_right() -> None:
    image = Image.fromarray(np.tile(np.linspace(0, 255, 32).astype(np.uint8)[None, :, None], (32, 1, 3)))
    for row in uniform((1,), torch.arange(30), CROP_UNIFORMS):
        pixels = Geometry("light", 16)(image, row).float()
        assert pixels[:, :, 12:].mean() > pixels[:, :, :4].mean() + 100
    flipped = [Geometry("standard", 16)(image, row).float() for row in uniform((1,), torch.arange(30), CROP_UNIFORMS)]
    rising = [float(pixels[:, :, 12:].mean() - pixels[:, :, :4].mean()) > 0 for pixels in flipped]
    assert 5 < sum(rising) < 25


@pytest.mark.parametrize("kind", TABLE["augmentation"])
def test_augment_rows_are_independent(kind: str) -> None:
    augment = Augment(kind)
    images = torch.stack([to_tensor(picture(24, 24, seed)) for seed in range(9)])
    numbers = uniform((0, "augment", 7), torch.arange(9), augment.num_uniforms)
    whole = augment(images, numbers)
    assert whole.dtype == torch.float32
    for parts in ([3, 6], [1, 1, 7], [4, 5]):
        pieces = [augment(image, number) for image, number in zip(images.split(parts), numbers.split(parts), strict=True)]
        assert torch.equal(torch.cat(pieces), whole)
    plain = augment(images)
    assert torch.equal(plain, (images.float() / 255 - 0.5) / 0.25)
    changed = (whole != plain).flatten(1).any(1)
    assert changed.any() == augment.uses_uniforms == (kind in ("color", "geom", "geom_color"))
    assert whole.abs().max() <= 2.0 + 1e-6


def test_color_without_strength_is_the_image() -> None:
    augment = Augment("color")
    images = to_tensor(picture(24, 24))[None]
    numbers = torch.full((1, augment.num_uniforms), 0.5)
    assert torch.allclose(augment(images, numbers), augment(images), atol=1e-4)
    numbers[0, 5] = 0.1  # grey
    grey = augment(images, numbers)
    assert torch.allclose(grey[:, 0], grey[:, 1], atol=5e-3)


def test_holes_and_blur() -> None:
    augment = Augment("geom", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    images = torch.full((1, 3, 56, 56), 255, dtype=torch.uint8)
    numbers = torch.full((1, augment.num_uniforms), 0.9)
    numbers[0, 6], numbers[0, 7] = 0.0, 0.0  # one hole
    holes = augment(images, numbers)
    assert int((holes == 0).sum()) == 3 * 10 * 10
    numbers[0, 18] = 0.0  # and a blur
    assert int(((augment(images, numbers) > 0) & (augment(images, numbers) < 1)).sum()) > 0
