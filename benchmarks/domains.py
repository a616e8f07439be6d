"""Several prepared data sets as one: a set of domains, on which learners can find work that differs.

    python -m benchmarks.domains data/glyph64 data/icons --out data/characters_icons

Every class keeps its split. Its name begins with that of its data set, and a column `domain` says which that is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.prepared import prepare
from dnc_dist.base.errors import InputError
from dnc_dist.data.index import DatasetIndex, open_index, text
from dnc_dist.data.manifest import SPLITS
from dnc_dist.data.readers import Reading, Sample
from dnc_dist.data.segments import read_rows


def read(roots: list[Path]) -> Reading:
    """The samples of all data sets, each under the name of its folder.

    Raises:
        InputError: less than two data sets, two folders of one name, or what is no prepared data set with classes.
    """
    names = [root.resolve().name for root in roots]
    if len(set(names)) < max(2, len(names)):
        raise InputError(f"the data sets are {', '.join(names)}; give two or more, in folders of different names")
    samples: list[Sample] = []
    options: dict[str, str | int | float | None] = {}
    for name, root in zip(names, roots, strict=True):
        index = open_index(root)
        index.check_labelled()
        samples += _samples(name, index)
        options[name] = index.content_hash
    return Reading("domains", samples, options, [f"joined from {', '.join(names)}"])


def _samples(domain: str, index: DatasetIndex) -> Iterator[Sample]:
    columns = index.columns
    for row, image in enumerate(read_rows(index, np.arange(len(index)))):
        yield Sample(
            f"{domain}/{index.class_names[columns['label'][row]]}",
            SPLITS[columns["split"][row]],
            f"{domain}/{text(columns['source'][row])}",
            data=image,
            query=bool(columns["query"][row]),
            gallery=bool(columns["gallery"][row]),
            extra=(("domain", domain),),
        )


def main() -> None:
    """Read, join and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("roots", type=Path, nargs="+", metavar="ROOT", help="folders of prepared data sets")
    parser.add_argument("--out", type=Path, required=True, help="where the joined data set goes")
    parser.add_argument("--force", action="store_true", help="replace the prepared data set that is there")
    args = parser.parse_args()
    prepare(lambda progress: read(args.roots), args.out, seed=0, force=args.force)


if __name__ == "__main__":
    main()
