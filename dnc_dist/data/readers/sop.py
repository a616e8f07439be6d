"""Reader of Stanford Online Products (Song et al., CVPR 2016) as its archive is laid out."""

from __future__ import annotations

from pathlib import Path

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import shorten
from dnc_dist.data.readers import TEST, TRAIN, Sample, plain
from dnc_dist.data.readers.benchmark import BenchmarkReader, Counts, check_there, inside, number, read_rows

_COLUMNS = "image_id class_id super_class_id path"


class SopReader(BenchmarkReader):
    """The archive of Stanford Online Products as it is: Ebay_train.txt is trained on, Ebay_test.txt tested."""

    source = "folder Stanford_Online_Products with Ebay_train.txt and Ebay_test.txt"
    archive = "Stanford_Online_Products"
    marks = ("Ebay_train.txt", "Ebay_test.txt")
    holds = "Ebay_train.txt, Ebay_test.txt and bicycle_final/ to toaster_final/"
    published = {"train": Counts(59_551, 11_318), "test": Counts(60_502, 11_316)}
    listed_in = {"train": "Ebay_train.txt", "test": "Ebay_test.txt"}

    def samples(self, root: Path) -> list[Sample]:
        found: list[Sample] = []
        super_class_of: dict[int, int] = {}
        for split in (TRAIN, TEST):
            listed = []
            for where, (_, class_id, super_class_id, path) in read_rows(root / self.listed_in[split], _COLUMNS, header=(_COLUMNS,)):
                label, group = number(class_id, where, "class_id"), number(super_class_id, where, "super_class_id")
                if super_class_of.setdefault(label, group) != group:
                    raise InputError(
                        f"{where}: class {label} has super-class {group} here and {super_class_of[label]} before; correct one of them"
                    )
                folder, slash, _ = inside(path, where).partition("/")
                if not slash:
                    raise InputError(f"{where}: the path {shorten(path)} has no folder of a super-class; correct the line")
                extra = (("super_class", plain(folder.removesuffix("_final"))),)
                listed.append(Sample(str(label), split, path, root / path, extra=extra))
            check_there(listed, str(root / self.listed_in[split]), "unpack the archive's *_final folders into --root again")
            found += listed
        return found
