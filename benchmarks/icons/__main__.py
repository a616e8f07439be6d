"""Icons: pictures of many fine classes, each drawn by many designers, built from pinned packages of the npm registry.

    python -m benchmarks.icons --out data/icons

A class is an icon's name over families that different designers drew; a sample is one family's drawing of it, in two colours of its own.
Classes are split by the stem of their names, so that `user` and `user-plus` are on one side. docs/datasets.md tells the rules, and how
many labels were found to be wrong. Packages are fetched once, by `npm pack`, into --cache; after that no network is needed.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from pathlib import Path

from benchmarks.icons.classes import IconClass, gather, without_repeats
from benchmarks.icons.drawing import colours
from benchmarks.icons.families import PINNED, Family, drawings, families, fetch
from benchmarks.prepared import prepare
from dnc_dist.base.errors import InputError
from dnc_dist.base.progress import Progress
from dnc_dist.data.index import hashed_share
from dnc_dist.data.readers import TEST, TRAIN, Reading, Sample

# Read off contact sheets of the pairs that they accept: docs/datasets.md.
ALIKE, SHARED = 0.97, 0.34


def read(listed: Path, cache: Path, size: int, least: int, seed: int, progress: Progress) -> Reading:
    """Draw the classes that enough families have, half of the stems for each split.

    Raises:
        InputError: a package cannot be had or is not the pinned one, or too few stems remain to make two splits.
        RunError: the renderer is missing.
    """
    chosen = families(listed)
    fetch(chosen, cache)
    all_drawings = [drawing for family in chosen for drawing in drawings(family, cache)]
    gathered = gather(all_drawings, {family.name: family.styles for family in chosen}, least, seed)
    classes, gone = without_repeats(gathered, ALIKE, SHARED, least, progress.counter("shapes", "drawing"))
    stems = sorted({entry.stem for entry in classes})
    if len(stems) < 4:
        raise InputError(f"{listed} gives {len(stems)} stems of classes that {least} families draw; at least 4 are needed for two splits")
    test = hashed_share(stems, 0.5, seed, "split")
    samples: list[Sample] = []
    count = progress.counter("pictures", "class")
    for done, entry in enumerate(classes, start=1):
        samples += _samples(entry, TEST if entry.stem in test else TRAIN, size, seed)
        count(done, len(classes))
    notes = [
        f"{len(all_drawings):,} icons of {len(chosen)} families; {len(gathered):,} names that {least} or more of them draw",
        f"left out: {', '.join(f'{count:,} {what}' for what, count in sorted(gone.items()))}",
        f"{len(classes):,} classes of {len(stems):,} stems; half of the stems, by a hash with --seed {seed}, are the test split",
        *_licences(chosen, Counter(sample.source.split("/")[0] for sample in samples)),
    ]
    digest = hashlib.sha256(listed.read_bytes()).hexdigest()[:16]
    return Reading("icons", samples, {"size": size, "least": least, "seed": seed, "families": digest}, notes)


def _samples(entry: IconClass, split: str, size: int, seed: int) -> list[Sample]:
    return [
        Sample(
            entry.name,
            split,
            f"{drawing.family}/{drawing.name}",
            data=drawing.png(size, *colours(seed, drawing.family, drawing.name)),
            extra=(("family", drawing.family), ("stem", entry.stem)),
        )
        for drawing in entry.drawings
    ]


def _licences(chosen: list[Family], pictures: Counter[str]) -> list[str]:
    """A sentence for each licence: the families under it, with designer, version and number of pictures."""
    by_licence: dict[str, list[str]] = {}
    for family in chosen:
        told = f"{family.name} {family.version} ({family.designer}, {pictures[family.name]:,})"
        by_licence.setdefault(family.licence, []).append(told)
    return [f"{licence}: {', '.join(told)}" for licence, told in sorted(by_licence.items())]


def main() -> None:
    """Fetch, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the prepared data set goes")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures, pixels")
    parser.add_argument("--families", type=Path, default=PINNED, metavar="FILE", help="a list like benchmarks/icons/families.json")
    parser.add_argument("--least", type=int, default=4, help="families that a class needs")
    parser.add_argument("--seed", type=int, default=0, help="of colours, styles and split")
    parser.add_argument("--cache", type=Path, default=Path("data/icon-packages"), help="folder of the packages")
    parser.add_argument("--force", action="store_true", help="replace the prepared data set that is there")
    args = parser.parse_args()
    prepare(
        lambda progress: read(args.families, args.cache, args.size, args.least, args.seed, progress),
        args.out,
        seed=args.seed,
        force=args.force,
    )


if __name__ == "__main__":
    main()
