"""Reader of Cars196 (Stanford Cars, Krause et al., 2013) in both layouts that were published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import shorten
from dnc_dist.base.matlab import read_mat
from dnc_dist.data.readers import TEST, TRAIN, Sample, plain
from dnc_dist.data.readers.benchmark import BenchmarkReader, Counts, check_there, inside

LAST_TRAINING_CLASS = 98
_WITH_LABELS = "cars_test_annos_withlabels.mat"
_AGAIN = "take the file from the archive again"


@dataclass(frozen=True)
class _InOneFolder:
    """An image of cars_annos.mat."""

    relative_im_path: str
    label: Annotated[int, Field(alias="class")]


@dataclass(frozen=True)
class _InTwoFolders:
    """An image of the lists of devkit/; that without labels has no class."""

    fname: str
    label: Annotated[int, Field(alias="class")]


@dataclass(frozen=True)
class _All:
    annotations: list[_InOneFolder]
    class_names: list[str]


@dataclass(frozen=True)
class _Part:
    annotations: list[_InTwoFolders]


@dataclass(frozen=True)
class _Meta:
    class_names: list[str]


class Cars196Reader(BenchmarkReader):
    """The archive of Cars196 as it is, in one folder or two: classes 1 to 98 are trained on, 99 to 196 tested.

    Read are ``car_ims/`` with ``cars_annos.mat``, or ``cars_train/`` and ``cars_test/`` with ``devkit/`` and
    ``cars_test_annos_withlabels.mat``. Which images are in ``cars_test`` belongs to another task and is not used.
    """

    source = "folder with car_ims/ and cars_annos.mat, or with cars_train/, cars_test/ and devkit/"
    archive = "Cars196"
    marks = ("car_ims", "cars_train", "cars_annos.mat", "devkit")
    holds = f"car_ims/ and cars_annos.mat, or cars_train/, cars_test/, devkit/ and {_WITH_LABELS}"
    published = {"train": Counts(8_054, 98), "test": Counts(8_131, 98)}
    listed_in = {"train": f"classes 1 to {LAST_TRAINING_CLASS}", "test": f"classes from {LAST_TRAINING_CLASS + 1}"}

    def samples(self, root: Path) -> list[Sample]:
        if (root / "car_ims").is_dir():
            table = root / "cars_annos.mat"
            whole = read_mat(table, _All, _AGAIN)
            found = _listed(root, table, whole.class_names, [(image.relative_im_path, image.label) for image in whole.annotations])
        elif (root / "cars_train").is_dir() or (root / "cars_test").is_dir():
            names = read_mat(root / "devkit/cars_meta.mat", _Meta, _AGAIN).class_names
            found = []
            for folder, table in (("cars_train", root / "devkit/cars_train_annos.mat"), ("cars_test", _with_labels(root))):
                images = read_mat(table, _Part, _AGAIN).annotations
                found += _listed(root, table, names, [(f"{folder}/{image.fname}", image.label) for image in images])
        else:
            raise InputError(f"{root} has no images: it should hold {self.holds}")
        return found


def _with_labels(root: Path) -> Path:
    """The list of cars_test/ that has classes: it was published later than devkit/, so that it lies beside or inside of it."""
    places = (root / "devkit" / _WITH_LABELS, root / _WITH_LABELS)
    if there := next((path for path in places if path.exists()), None):
        return there
    raise InputError(f"{places[0]} is missing; the list without labels, cars_test_annos.mat, does not do: it has no classes")


def _listed(root: Path, table: Path, names: list[str], images: list[tuple[str, int]]) -> list[Sample]:
    found = []
    for row, (path, label) in enumerate(images, start=1):
        where = f"{table}, annotation {row}"
        if not 1 <= label <= len(names):
            raise InputError(f"{where}: class {shorten(label)}; there are {len(names)} class_names; {_AGAIN}")
        # With its number, as no two classes may have the same name.
        class_name = plain(f"{label:03d}.{names[label - 1]}")
        found.append(Sample(class_name, TRAIN if label <= LAST_TRAINING_CLASS else TEST, inside(path, where), root / path))
    check_there(found, str(table), "unpack the archive's images into --root again")
    return found
