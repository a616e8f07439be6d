"""A miniature VehicleID in exactly the layout of the archive: 7-digit images, split files with rows `<image> <id>`, attributes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from dnc_dist.data.readers.vehicleid import FILES

# Ids of each list; as in the archive, the smaller test lists are parts of the larger ones.
NESTED = {"train": range(1, 7), "small": range(11, 14), "medium": range(11, 16), "large": range(11, 18)}
DISJOINT = {"train": range(1, 7), "small": range(11, 14), "medium": range(14, 16), "large": range(16, 21)}


def make_vehicleid(root: Path, lists: Mapping[str, range] = NESTED, *, per_id: int = 4, size: int = 16) -> Path:
    """Write the tree: every id has ``per_id`` noisy pictures of its own pattern, and one image is in no list."""
    generator = np.random.default_rng(7)
    (root / "image").mkdir(parents=True)
    (root / "train_test_split").mkdir()
    rows = []
    for vehicle in sorted({vehicle for ids in lists.values() for vehicle in ids}):
        pattern = generator.uniform(40, 215, (4, 4, 3)).repeat(size // 4, 0).repeat(size // 4, 1)
        for _ in range(per_id):
            rows.append((7 * len(rows) + 3, vehicle))
            pixels = (pattern + generator.normal(0, 40, pattern.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "image" / f"{rows[-1][0]:07d}.jpg")
    Image.new("RGB", (size, size)).save(root / "image" / "0999999.jpg")
    for name, ids in lists.items():
        lines = [f"{image:07d} {vehicle}\n" for image, vehicle in rows if vehicle in ids]
        (root / "train_test_split" / FILES[name]).write_text("".join(lines))
    (root / "attribute").mkdir()
    (root / "attribute" / "img2vid.txt").write_text("".join(f"{image:07d} {vehicle}\n" for image, vehicle in rows))
    return root
