"""Reader of VehicleID (Liu et al., CVPR 2016) as its archive is laid out: ``image/*.jpg`` and ``train_test_split/*.txt``."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import read_text, shorten
from dnc_dist.data.index import LISTS
from dnc_dist.data.readers import TEST, TRAIN, Reader, Reading, Sample, plain

FILES = {"train": "train_list.txt", "small": "test_list_800.txt", "medium": "test_list_1600.txt", "large": "test_list_2400.txt"}
# (images, ids). The paper counts otherwise: vehicles with fake plates were found after it, and every list was made anew.
RELEASED = {"train": (113_346, 13_164), "small": (6_493, 800), "medium": (13_377, 1_600), "large": (19_777, 2_400)}
_ROW = re.compile(r"([0-9]{1,7})\s+([0-9]{1,18})")


def _file_name(image: int) -> str:
    return f"{image:07d}.jpg"


def _read_list(path: Path, vehicle_of: dict[int, int]) -> set[int]:
    """The images of a list; ``vehicle_of`` (image -> id, of all lists) learns its ids."""
    if not path.exists():
        raise InputError(
            f"{path} is missing; --root must be the archive's own folder, which holds image/ and train_test_split/ with "
            f"{', '.join(FILES.values())}"
        )
    images = set()
    for number, line in enumerate(io.StringIO(read_text(path), newline=None), start=1):
        if not line.strip():
            continue
        row = _ROW.fullmatch(line.strip())
        if row is None:
            raise InputError(
                f"{path}, line {number}: {shorten(line.strip())} is no row `<image> <id>`, two numbers such as `0000123 45`; "
                "correct the line"
            )
        image, vehicle = int(row[1]), int(row[2])
        if vehicle_of.setdefault(image, vehicle) != vehicle:
            raise InputError(
                f"{path}, line {number}: image {_file_name(image)} has id {vehicle}, but id {vehicle_of[image]} in a row before or in "
                "another list; an image shows one vehicle: correct one of the rows"
            )
        images.add(image)
    if len({vehicle_of[image] for image in images}) == len(images):
        raise InputError(f"{path} lists {len(images)} images and no vehicle twice; at least one id needs two images, to be found again")
    return images


def _notes(images: dict[str, set[int]], vehicle_of: dict[int, int], num_unlisted: int) -> list[str]:
    counts = {name: (len(rows), len({vehicle_of[image] for image in rows})) for name, rows in images.items()}
    words = {name: f"{FILES[name]} has {counts[name][0]:,} images of {counts[name][1]:,} ids" for name in images}
    other = [f"{words[name]} (released: {of[0]:,} of {of[1]:,})" for name, of in RELEASED.items() if counts[name] != of]
    shared = [f"{a} and {b} share {len(images[a] & images[b]):,}" for a, b in combinations(list(images)[1:], 2)]
    notes = [f"not the release: {'; '.join(other)}" if other else f"as released: {'; '.join(words.values())}"]
    notes.append(f"images of the test lists: {', '.join(shared)}")
    if num_unlisted:
        notes.append(f"{num_unlisted:,} files in image/ are in none of these lists and are left out")
    return notes


class VehicleIdReader(Reader):
    """The archive of VehicleID as it is: image/*.jpg and train_test_split/*.txt."""

    source = "folder with image/ and train_test_split/"

    def read(self, root: Path | None, *, seed: int, progress: Callable[[int, int], None] | None) -> Reading:
        assert root is not None
        return _read(root)


def _read(root: Path) -> Reading:
    """List the images of the training list and of the three test lists, each once; ``lists`` says in which test lists an image is.

    Raises:
        InputError: a list or an image is missing, a row means nothing, an image has two ids, or an id is to be trained on and tested.
    """
    vehicle_of: dict[int, int] = {}
    images = {name: _read_list(root / "train_test_split" / file, vehicle_of) for name, file in FILES.items()}
    trained = {vehicle_of[image] for image in images["train"]}
    for name in list(FILES)[1:]:
        if both := sorted(trained & {vehicle_of[image] for image in images[name]}):
            raise InputError(
                f"{len(both)} ids are in {FILES['train']} and in {FILES[name]} of {root / 'train_test_split'}, first {both[0]}; "
                "vehicles to test on must be unseen: take them out of one of the two lists"
            )
    # One listing of the folder instead of 130,000 questions, which take minutes on a network file system.
    there = set(os.listdir(root / "image")) if (root / "image").is_dir() else set()
    if absent := [image for image in sorted(vehicle_of) if _file_name(image) not in there]:
        raise InputError(
            f"{len(absent):,} of {len(vehicle_of):,} images that the lists name are missing, first "
            f"{root / 'image' / _file_name(absent[0])}; unpack the archive's image/ into --root again"
        )
    samples = [
        Sample(
            class_name=str(vehicle_of[image]),
            split=TRAIN if image in images["train"] else TEST,
            source=f"image/{_file_name(image)}",
            path=root / "image" / _file_name(image),
            extra=((LISTS, " ".join(name for name in list(FILES)[1:] if image in images[name])),),
        )
        for image in sorted(vehicle_of)
    ]
    return Reading("vehicleid", samples, {"root": plain(os.path.realpath(root))}, _notes(images, vehicle_of, len(there) - len(vehicle_of)))
