"""Reader of image folders: ``split/class/*.jpg``, ``class/*.jpg`` with a stated rule for the split, or images without classes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.data.images import SUFFIXES
from dnc_dist.data.index import hashed_share
from dnc_dist.data.manifest import is_prepared
from dnc_dist.data.readers import NO_CLASS, TEST, TRAIN, VALIDATION, Reader, Reading, Sample, plain

# Folder name (lower case) -> split, asked as a query, searched as gallery.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), (TRAIN, True, True)),
    **dict.fromkeys(("validation", "valid", "val", "dev"), (VALIDATION, True, True)),
    **dict.fromkeys(("test", "testing"), (TEST, True, True)),
    **dict.fromkeys(("query", "queries", "probe"), (TEST, True, False)),
    "gallery": (TEST, False, True),
}


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As ``os.walk``, through links, too. A folder that cannot be read is an error: its images must not be missing in silence.

    Raises:
        OSError: that.
    """

    def refuse(error: OSError) -> None:
        raise error

    return os.walk(folder, onerror=refuse, followlinks=True)


class _Walk:
    """Lists folders and images, and counts what it passes over; what begins with a dot is ignored."""

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()
        self.loops: list[Path] = []

    def folders(self, folder: Path) -> list[Path]:
        """The folders in a folder, sorted; images beside them belong to no class."""
        found = []
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                found += [path] if self._may_hold_images(path) else []
            elif path.suffix.lower() in SUFFIXES:
                self.skipped[f"{path.suffix.lower()} outside of class folders"] += 1
            else:
                self._count(path)
        return found

    def images_below(self, folder: Path) -> list[Path]:
        """The images in a folder and its subfolders by name, sorted. Links are followed, into each real folder once."""
        found: list[Path] = []
        seen = {os.path.realpath(folder)}
        for place, folders, files in walk(folder):
            followed = []
            for name in sorted(folders):
                path = Path(place, name)
                if not name.startswith(".") and self._may_hold_images(path) and (real := os.path.realpath(path)) not in seen:
                    seen.add(real)
                    followed.append(name)
            folders[:] = followed
            for name in sorted(files):
                path = Path(place, name)
                if _is_image(path):
                    found.append(path)
                elif not name.startswith("."):
                    self._count(path)
        return found

    def notes(self) -> list[str]:
        """What was passed over, in sentences."""
        notes = []
        if self.skipped:
            counts = [f"{count:,} {what}" for what, count in self.skipped.most_common(8)]
            notes.append(f"skipped, as they are no images that can be read: {', '.join(counts)}{' …' if len(self.skipped) > 8 else ''}")
        if self.loops:
            notes.append(f"skipped {len(self.loops)} link(s) to a folder above, first {plain(self.loops[0])}")
        return notes

    def _count(self, path: Path) -> None:
        self.skipped[plain(path.suffix.lower()) or "without an ending"] += 1

    def _may_hold_images(self, folder: Path) -> bool:
        """Not a prepared data set, whose contact sheet is no photo; nor a link to a folder that it lies in: all that is below would be
        listed again, without end."""
        if folder.is_symlink() and Path(os.path.realpath(folder.parent)).is_relative_to(os.path.realpath(folder)):
            self.loops.append(folder)
            return False
        if is_prepared(folder):
            self.skipped["prepared data set(s)"] += 1
            return False
        return True


class FolderReader(Reader):
    """Image folders: split/class/*.jpg, or class/*.jpg with `test_share` of the classes as test split; without class folders a gallery.

    A class is a folder that holds images, at any depth; its path is its name: train/WOMEN/Dresses/id_1/*.jpg is class WOMEN/Dresses/id_1.
    """

    class Options(parts.Options):
        test_share: float = Field(0.5, ge=0, le=0.9)
        """Share of test classes, if not in split folders."""
        labels: Literal["folders", "none"] = "folders"
        """`folders`: a folder that holds images is a class; `none`: no image has a class, all are a gallery to be embedded and searched."""

    def read(self, root: Path | None, *, seed: int, progress: Callable[[int, int], None] | None) -> Reading:
        assert root is not None
        if not root.is_dir():
            raise InputError(f"--root {root} is no folder; give the folder that holds split/class/*.jpg or class/*.jpg")
        if is_prepared(root):
            raise InputError(f"--root {root} is a prepared data set; give the folder of images that it is to be made of")
        options = {"root": plain(os.path.realpath(root)), "test_share": self.options.test_share, "seed": seed}
        if self.options.labels == "none":
            samples, notes = _without_classes(root)
            return Reading("folder", samples, {**options, "labels": "none"}, notes)
        samples, notes = _with_classes(root, self.options.test_share, seed)
        if not samples and any(_is_image(path) for path in root.iterdir()):
            samples, notes = _without_classes(root)
        if not samples:
            found = f" ({'; '.join(notes)})" if notes else ""
            raise InputError(f"--root {root} holds no image in class folders; expected split/class/*.jpg or class/*.jpg{found}")
        return Reading("folder", samples, options, notes)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _without_classes(root: Path) -> tuple[list[Sample], list[str]]:
    """All images at any depth as a gallery, and notes."""
    walk = _Walk()
    paths = walk.images_below(root)
    samples = [Sample(NO_CLASS, TEST, plain(path.relative_to(root)), path, query=False) for path in paths]
    return samples, [
        "no classes: all images are a gallery, which can be embedded and searched; nothing can be trained on it",
        *walk.notes(),
    ]


def _with_classes(root: Path, test_share: float, seed: int) -> tuple[list[Sample], list[str]]:
    """The images in class folders, and notes.

    A folder called ``train`` makes it ``split/class/*``, with the split names of ``SPLIT_NAMES``; otherwise every folder that holds
    images is a class, and ``test_share`` of the classes, chosen by a seeded hash of their names, become the test split.
    """
    walk = _Walk()
    tops = walk.folders(root)
    samples: list[Sample] = []
    notes: list[str] = []
    if any(SPLIT_NAMES.get(top.name.lower(), ("",))[0] == TRAIN for top in tops):
        ignored = [plain(top.name) for top in tops if top.name.lower() not in SPLIT_NAMES]
        if ignored:
            notes.append(f"ignored, as they are no splits: {', '.join(ignored[:5])}{' …' if len(ignored) > 5 else ''}")
        for top in tops:
            if top.name.lower() in SPLIT_NAMES:
                split, query, gallery = SPLIT_NAMES[top.name.lower()]
                for name, paths in _classes(walk, top, walk.folders(top)).items():
                    samples += [Sample(name, split, plain(path.relative_to(root)), path, query=query, gallery=gallery) for path in paths]
    else:
        classes = _classes(walk, root, tops)
        held_out = hashed_share(sorted(classes), test_share, seed, "split") if len(classes) > 1 and test_share > 0 else set()
        for name, paths in classes.items():
            split = TEST if name in held_out else TRAIN
            samples += [Sample(name, split, plain(path.relative_to(root)), path) for path in paths]
        notes.append(
            f"no folder `train`: every folder is a class; {len(held_out)} of {len(classes)} classes (--test-share {test_share:g}, by a "
            f"hash of their names with --seed {seed}) are the test split"
        )
    names = {sample.class_name for sample in samples}
    if deep := sorted(name for name in names if "/" in name):
        notes.append(f"a class is a folder that holds images: {len(deep):,} of {len(names):,} lie deeper than one level, first {deep[0]}")
    if around := sorted({name for name in deep if any(str(above) in names for above in PurePosixPath(name).parents)}):
        notes.append(f"{len(around):,} of these lie inside of another class and are classes of their own, first {around[0]}")
    return samples, notes + walk.notes()


def _classes(walk: _Walk, base: Path, folders: list[Path]) -> dict[str, list[Path]]:
    """The images in and below some folders by class: the folder that holds them, as its path below ``base``."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for path in walk.images_below(folder):
            found.setdefault(plain(path.parent.relative_to(base)), []).append(path)
    return found
