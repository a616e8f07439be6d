"""Classes of drawings: an icon's name over the families, one drawing of each, and no drawing that another one repeats."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.icons.drawing import Drawing, same, shape
from benchmarks.icons.names import bare, class_key, class_name, stem


@dataclass(frozen=True)
class IconClass:
    """A class: its name, the stem that decides its side of the split, and a drawing of each family, in the order of families."""

    name: str
    stem: str
    drawings: list[Drawing]


def gather(drawings: list[Drawing], styles: dict[str, str], least: int, seed: int) -> list[IconClass]:
    """The classes that enough families draw.

    A family gives one drawing to a class. Alternatives (`home-2`, `home-variant`) are taken only where there is no plain one; of several
    styles a hash takes one.

    Args:
        drawings: of all families.
        styles: family -> the words that its names end with for a style.
        least: families that a class needs.
        seed: of the choice of styles.
    """
    found: dict[str, dict[str, list[tuple[bool, str, str, Drawing]]]] = defaultdict(lambda: defaultdict(list))
    for drawing in drawings:
        name, alternative = bare(drawing.name, styles[drawing.family].split())
        if any(word.isalpha() for word in name.split("-")):
            order = hashlib.blake2b(repr((seed, drawing.family, drawing.name)).encode(), digest_size=8).hexdigest()
            found[class_key(name)][drawing.family].append((alternative, order, name, drawing))
    classes = []
    for by_family in found.values():
        if len(by_family) >= least:
            chosen = [min(by_family[family], key=lambda entry: entry[:2]) for family in sorted(by_family)]
            name = class_name([entry[2] for entry in chosen])
            classes.append(IconClass(name, stem(name), [entry[3] for entry in chosen]))
    return sorted(classes, key=lambda entry: entry.name)


def without_repeats(
    classes: list[IconClass], alike: float, shared: float, least: int, progress: Callable[[int, int], None]
) -> tuple[list[IconClass], Counter[str]]:
    """The classes without blank drawings, without copies inside a class, and without classes that show what another one shows.

    Two families may draw the same (one is a branch of the other, or copies it): one of the two is kept. Two names may mean one
    picture (`home` and `house`): of two classes that repeat each other in a share of their drawings, the smaller one goes; single
    drawings that repeat one of a larger class go alone.

    Args:
        classes: from ``gather``.
        alike: the correlation from which on two drawings are one.
        shared: the share of a class's drawings that repeat drawings of larger classes, from which on the class goes.
        least: drawings that a class needs.
        progress: called with (drawings seen, drawings in all).

    Returns:
        The classes left, and how many drawings and classes went, by reason.
    """
    entries = [(at, drawing) for at, entry in enumerate(classes) for drawing in entry.drawings]
    shapes = []
    for done, (_, drawing) in enumerate(entries, start=1):
        shapes.append(shape(drawing))
        progress(done, len(entries))
    gone: Counter[str] = Counter({"blank drawings": sum(found is None for found in shapes)})
    seen = [(entry, found) for entry, found in zip(entries, shapes, strict=True) if found is not None]
    # The larger class comes first, and keeps what it shares with a smaller one.
    seen.sort(key=lambda pair: (-len(classes[pair[0][0]].drawings), pair[0][0]))
    repeats: dict[int, list[int]] = defaultdict(list)
    for first, second in same(np.stack([found for _, found in seen]), alike):
        repeats[second].append(first)
    members: dict[int, list[int]] = defaultdict(list)
    for place, ((at, _), _) in enumerate(seen):
        members[at].append(place)
    owner = [at for (at, _), _ in seen]
    kept: set[int] = set()
    left = []
    for at, places in members.items():
        before = [place for place in places if any(first in kept and owner[first] != at for first in repeats[place])]
        if len(before) >= shared * len(places):
            gone["classes that repeat another one"] += 1
            continue
        mine: list[int] = []
        for place in places:
            if place in before:
                gone["drawings that a larger class has, too"] += 1
            elif any(first in mine for first in repeats[place]):
                gone["copies inside a class"] += 1
            else:
                mine.append(place)
        if len(mine) < least:
            gone["classes with too few drawings left"] += 1
            continue
        kept |= set(mine)
        left.append(IconClass(classes[at].name, classes[at].stem, [seen[place][0][1] for place in mine]))
    return sorted(left, key=lambda entry: entry.name), gone
