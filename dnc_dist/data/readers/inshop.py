"""Reader of In-shop Clothes Retrieval (DeepFashion, Liu et al., CVPR 2016) as its archive is laid out."""

from __future__ import annotations

from pathlib import Path

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import shorten
from dnc_dist.data.readers import TEST, TRAIN, Sample, plain
from dnc_dist.data.readers.benchmark import BenchmarkReader, Counts, check_there, inside, read_rows

_LIST = "list_eval_partition.txt"
_COLUMNS = "image_name item_id evaluation_status"
_ROLES = {"train": (TRAIN, True, True), "query": (TEST, True, False), "gallery": (TEST, False, True)}


class InshopReader(BenchmarkReader):
    """The archive of In-shop Clothes Retrieval as it is: training images, queries and a gallery, as list_eval_partition.txt says.

    Images are in ``img/`` or ``Img/img/``. ``super_class`` is the kind of clothes, such as WOMEN/Dresses.
    """

    source = "folder with Eval/list_eval_partition.txt and img/"
    archive = "In-shop Clothes Retrieval Benchmark"
    marks = (f"Eval/{_LIST}", _LIST)
    holds = f"Eval/{_LIST} (or {_LIST} itself) and img/ or Img/img/"
    published = {"train": Counts(25_882, 3_997), "query": Counts(14_218, 3_985), "gallery": Counts(12_612, 3_985)}
    listed_in = dict.fromkeys(published, _LIST)

    def samples(self, root: Path) -> list[Sample]:
        listed_in = next(root / mark for mark in self.marks if (root / mark).exists())
        folder = self._images(root)
        found = []
        for where, (path, item, status) in read_rows(listed_in, _COLUMNS, header=("#", _COLUMNS)):
            if status not in _ROLES:
                raise InputError(f"{where}: evaluation_status is {shorten(status)}; allowed are {', '.join(_ROLES)}")
            if not inside(path, where).startswith("img/"):
                raise InputError(f"{where}: the path {shorten(path)} does not begin with img/; correct the line")
            split, query, gallery = _ROLES[status]
            kind = plain("/".join(path.split("/")[1:-2]))  # between img/ and the folder of the item
            found.append(Sample(item, split, path, folder / path, query=query, gallery=gallery, extra=(("super_class", kind),)))
        check_there(found, str(listed_in), f"unpack the archive's img.zip into {folder} again")
        return found

    def _images(self, root: Path) -> Path:
        """The folder that the paths of the list begin in."""
        for folder in (root, root / "Img"):
            if (folder / "img").is_dir():
                return folder
        packed = next((path for path in (root / "Img/img.zip", root / "img.zip") if path.is_file()), None)
        cure = f"unpack {packed} where it is" if packed else "put the folder img of the archive there"
        raise InputError(f"{root} holds neither img/ nor Img/img/, where the images should be; {cure}")
