"""Reader of image folders: ``split/class/*.jpg``, or ``class/*.jpg`` with a stated rule for the split."""

from __future__ import annotations

import os
from pathlib import Path

from dnc_dist.data.index import hashed_share
from dnc_dist.data.readers import IMAGE_SUFFIXES, TEST, TRAIN, VALIDATION, Reading, Sample
from dnc_dist.errors import InputError

# Folder name (lower case) -> split, asked as a query, searched as gallery.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), (TRAIN, True, True)),
    **dict.fromkeys(("validation", "valid", "val", "dev"), (VALIDATION, True, True)),
    **dict.fromkeys(("test", "testing"), (TEST, True, True)),
    **dict.fromkeys(("query", "queries", "probe"), (TEST, True, False)),
    "gallery": (TEST, False, True),
}


def images_below(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders by name, sorted; what begins with a dot is ignored."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in sorted(files) if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES]
    return found


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def read(root: Path, *, test_share: float = 0.5, seed: int = 0) -> Reading:
    """List the images of a folder.

    A folder called ``train`` makes it ``split/class/*``, with the split names of ``SPLIT_NAMES``; otherwise every folder is a class,
    and ``test_share`` of the classes, chosen by a seeded hash of their names, become the test split.

    Raises:
        InputError: the folder is missing or holds no image in class folders.
    """
    if not root.is_dir():
        raise InputError(f"--root {root} is no folder; give the folder that holds split/class/*.jpg or class/*.jpg")
    tops = _folders(root)
    samples: list[Sample] = []
    notes: list[str] = []
    if any(SPLIT_NAMES.get(top.name.lower(), ("",))[0] == TRAIN for top in tops):
        ignored = [top.name for top in tops if top.name.lower() not in SPLIT_NAMES]
        if ignored:
            notes.append(f"ignored, as they are no splits: {', '.join(ignored[:5])}{' …' if len(ignored) > 5 else ''}")
        for top in tops:
            if top.name.lower() in SPLIT_NAMES:
                split, query, gallery = SPLIT_NAMES[top.name.lower()]
                for folder in _folders(top):
                    samples += [
                        Sample(folder.name, split, str(path.relative_to(root)), path, query=query, gallery=gallery)
                        for path in images_below(folder)
                    ]
    else:
        classes = {top.name: paths for top in tops if (paths := images_below(top))}
        held_out = hashed_share(sorted(classes), test_share, seed, "split") if len(classes) > 1 and test_share > 0 else set()
        for name, paths in classes.items():
            split = TEST if name in held_out else TRAIN
            samples += [Sample(name, split, str(path.relative_to(root)), path) for path in paths]
        notes.append(
            f"no folder `train`: every folder is a class; {len(held_out)} of {len(classes)} classes (--test-share {test_share:g}, by a "
            f"hash of their names with --seed {seed}) are the test split"
        )
    if not samples:
        raise InputError(f"--root {root} holds no image in class folders; expected split/class/*.jpg or class/*.jpg")
    return Reading("folder", samples, {"root": str(root.resolve()), "test_share": test_share, "seed": seed}, notes)
