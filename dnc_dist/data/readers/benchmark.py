"""What the readers of the published benchmarks share: the right folder, lists with rows of fields, images that are there, known counts."""

from __future__ import annotations

import io
import os
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal, NamedTuple

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import read_text, shorten
from dnc_dist.data.readers import TRAIN, Reader, Reading, Sample, plain

_PACKED = {".zip": "unzip", ".tar": "tar xf", ".tgz": "tar xf", ".tar.gz": "tar xf"}
_AGAIN = "unpack the archive again"


class Counts(NamedTuple):
    """Images and classes of a part of a benchmark."""

    images: int
    classes: int

    def __str__(self) -> str:
        return f"{self.images:,} images of {self.classes:,} classes"


class BenchmarkReader(Reader):
    """Base of readers of an archive whose layout and counts are known."""

    class Options(parts.Options):
        counts: Literal["published", "any"] = "published"
        """`published`: refuse an archive with other numbers of images or classes than the published ones; `any`: only tell of them."""

    archive: ClassVar[str]
    """What messages call it: the folder into which it unpacks, if that has one name."""
    marks: ClassVar[tuple[str, ...]]
    """Files or folders in it; each that is there shows that this is the folder."""
    holds: ClassVar[str]
    """What is in it, for messages."""
    published: ClassVar[Mapping[str, Counts]]
    """Part ("train", "test", "query", "gallery") -> its counts."""
    listed_in: ClassVar[Mapping[str, str]]
    """Part -> the file that lists it."""

    @abstractmethod
    def samples(self, root: Path) -> list[Sample]:
        """All images that the lists of the archive name, in their order.

        Raises:
            InputError: a list is missing or damaged, or an image is.
        """

    def read(self, root: Path | None, *, seed: int, progress: Callable[[int, int], None] | None) -> Reading:
        assert root is not None
        self._check_root(root)
        samples = self.samples(root)
        self._check_samples(samples)
        name = parts.name_of("reader", type(self))
        return Reading(name, samples, {"root": plain(os.path.realpath(root))}, [self._checked_counts(samples)])

    def _check_root(self, root: Path) -> None:
        """Refuse what is not the archive's folder, and say which one is.

        Raises:
            InputError: it is a file, it is not there, or it is another folder.
        """
        if root.is_file():
            how = next((how for ending, how in _PACKED.items() if root.name.lower().endswith(ending)), None)
            cure = f"unpack it (`{how} {root.name}`) and give the folder that comes out" if how else f"give the folder of {self.archive}"
            raise InputError(f"--root {root} is a file; {cure}, which holds {self.holds}")
        if not root.is_dir():
            raise InputError(f"--root {root} is not there; give the folder of {self.archive}, which holds {self.holds}")
        if self._is_archive(root):
            return
        below = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        above = Path(os.path.abspath(root)).parent
        near = next((path for path in (*below, above) if self._is_archive(path)), None)
        hint = f"did you mean --root {near}?" if near else f"give the folder of {self.archive}"
        raise InputError(f"--root {root} is another folder: {self.marks[0]} is missing; it should hold {self.holds}; {hint}")

    def _is_archive(self, folder: Path) -> bool:
        return any((folder / mark).exists() for mark in self.marks)

    def _check_samples(self, samples: list[Sample]) -> None:
        """Refuse images that are listed twice and classes that are to be trained on and tested."""
        seen: set[str] = set()
        for sample in samples:
            if sample.source in seen:
                raise InputError(f"{self._file_of(sample)} lists {plain(sample.source)} again; an image must be listed once")
            seen.add(sample.source)
        trained = {sample.class_name for sample in samples if sample.split == TRAIN}
        if both := sorted(trained & {sample.class_name for sample in samples if sample.split != TRAIN}):
            raise InputError(
                f"{len(both):,} classes are to be trained on and tested, first {plain(both[0])}; classes to test on must be unseen: "
                "take the lists from the archive again"
            )

    def _file_of(self, sample: Sample) -> str:
        return self.listed_in[_part(sample)]

    def _checked_counts(self, samples: list[Sample]) -> str:
        """A sentence about the counts.

        Raises:
            InputError: they are not the published ones, and ``counts`` asks for these.
        """
        classes: dict[str, list[str]] = defaultdict(list)
        for sample in samples:
            classes[_part(sample)].append(sample.class_name)
        found = {part: Counts(len(classes[part]), len(set(classes[part]))) for part in self.published}
        words = {part: f"{part} ({self.listed_in[part]}) has {counts}" for part, counts in found.items()}
        other = [f"{words[part]}, published are {counts}" for part, counts in self.published.items() if found[part] != counts]
        if not other:
            return f"as published: {'; '.join(words.values())}"
        if self.options.counts == "published":
            raise InputError(f"not the published {self.archive}: {'; '.join(other)}; {_AGAIN}, or take what is there with --counts any")
        return f"not as published: {'; '.join(other)}"


def _part(sample: Sample) -> str:
    return sample.split if sample.query == sample.gallery else "query" if sample.query else "gallery"


def read_rows(path: Path, columns: str, *, header: Sequence[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """The rows of a list: "file, line n" and its fields; blank lines are passed over, runs of spaces are one.

    Args:
        path: the list.
        columns: names of the fields, as in ``<image_id> <image_name>``.
        header: what the first lines have to be, with single spaces; "#": any whole number, that of the rows.

    Raises:
        InputError: it cannot be read, a row has another number of fields, or its header says something else.
    """
    if not path.exists():
        raise InputError(f"{path} is missing; {_AGAIN}")
    lines = [" ".join(line.split()) for line in io.StringIO(read_text(path), newline=None)]
    for number, expected in enumerate(header, start=1):
        found = lines[number - 1] if number <= len(lines) else ""
        if not (found.isascii() and found.isdigit() and len(found) < 19 if expected == "#" else found == expected):
            words = "the number of its rows" if expected == "#" else repr(expected)
            raise InputError(f"{path}, line {number}: {shorten(found)} where {words} should be; {_AGAIN}")
    expected_fields = len(columns.split())
    count = 0
    for number, line in enumerate(lines[len(header) :], start=len(header) + 1):
        if not line:
            continue
        fields = line.split(" ")
        if len(fields) != expected_fields:
            raise InputError(
                f"{path}, line {number}: {shorten(line)} has {len(fields)} field(s), not the {expected_fields} of `{columns}`; "
                f"correct the line, or {_AGAIN}"
            )
        count += 1
        yield f"{path}, line {number}", fields
    if "#" in header and count != (said := int(lines[header.index("#")])):
        raise InputError(f"{path} has {count:,} rows, but its first line says {said:,}; it is cut off or was changed: {_AGAIN}")


def number(text: str, where: str, what: str) -> int:
    """A whole number of a list.

    Raises:
        InputError: it is none, or below 1.
    """
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) >= 1):
        raise InputError(f"{where}: {what} is {shorten(text)}, not a whole number from 1; correct the line")
    return int(text)


def inside(path: str, where: str) -> str:
    """A relative path of a list that does not leave its folder.

    Raises:
        InputError: it leads elsewhere.
    """
    parts_of_path = PurePosixPath(path).parts
    if not parts_of_path or path.startswith("/") or ".." in parts_of_path or "\0" in path:
        raise InputError(f"{where}: the path {shorten(path)} leads out of the archive; correct it")
    return path


def check_there(samples: Sequence[Sample], listed_in: str, cure: str) -> None:
    """Refuse samples whose files are not there; asks for each folder once, as 120,000 questions take minutes on a network file system.

    Raises:
        InputError: images are missing; names how many, and the first.
    """
    there: dict[Path, set[str]] = {}
    absent = []
    for sample in samples:
        path = sample.location()
        if path.parent not in there:
            there[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        if path.name not in there[path.parent]:
            absent.append(path)
    if absent:
        raise InputError(f"{len(absent):,} of {len(samples):,} images that {listed_in} lists are missing, first {absent[0]}; {cure}")
