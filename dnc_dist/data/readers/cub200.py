"""Reader of CUB-200-2011 (Wah et al., 2011) as its archive is laid out."""

from __future__ import annotations

from pathlib import Path

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import shorten
from dnc_dist.data.readers import TEST, TRAIN, Sample
from dnc_dist.data.readers.benchmark import BenchmarkReader, Counts, check_there, inside, number, read_rows

LAST_TRAINING_CLASS = 100


class Cub200Reader(BenchmarkReader):
    """The archive of CUB-200-2011 as it is: classes 1 to 100 are trained on, 101 to 200 tested.

    ``train_test_split.txt`` belongs to another task (all classes in both parts) and is not used.
    """

    source = "folder CUB_200_2011 with images/ and images.txt"
    archive = "CUB_200_2011"
    marks = ("images.txt", "image_class_labels.txt")
    holds = "images/, images.txt, image_class_labels.txt and classes.txt"
    published = {"train": Counts(5_864, 100), "test": Counts(5_924, 100)}
    listed_in = {
        "train": f"classes 1 to {LAST_TRAINING_CLASS} of image_class_labels.txt",
        "test": f"classes from {LAST_TRAINING_CLASS + 1} of image_class_labels.txt",
    }

    def samples(self, root: Path) -> list[Sample]:
        names = {
            number(class_id, where, "class_id"): name
            for where, (class_id, name) in read_rows(root / "classes.txt", "<class_id> <class_name>")
        }
        labels = root / "image_class_labels.txt"
        class_of: dict[str, int] = {}
        for where, (image_id, class_id) in read_rows(labels, "<image_id> <class_id>"):
            if number(class_id, where, "class_id") not in names:
                raise InputError(f"{where}: class_id {shorten(class_id)} is not in {root / 'classes.txt'}; unpack the archive again")
            if class_of.setdefault(image_id, int(class_id)) != int(class_id):
                raise InputError(
                    f"{where}: image {shorten(image_id)} has class {class_id} here and {class_of[image_id]} before; correct one"
                )
        found = []
        for where, (image_id, path) in read_rows(root / "images.txt", "<image_id> <image_name>"):
            if image_id not in class_of:
                raise InputError(f"{where}: image {shorten(image_id)} has no class in {labels}; unpack the archive again")
            label = class_of[image_id]
            source = f"images/{inside(path, where)}"
            found.append(Sample(names[label], TRAIN if label <= LAST_TRAINING_CLASS else TEST, source, root / source))
        check_there(found, str(root / "images.txt"), "unpack the archive's images/ into --root again")
        return found
