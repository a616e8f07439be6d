"""What the batches of a learner are drawn from: its classes at random, or groups of close classes; and the rows of each class.

Everything comes in endless passes, each in a new random order, so that classes, groups and rows are drawn about equally often.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray


class _ClassPlaces:
    """The places of one class of a learner in endless passes, each in a new random order."""

    def __init__(self, places: NDArray[np.int64], generator: np.random.Generator) -> None:
        self.places, self.generator = places, generator
        self.used = len(places)

    def take(self, count: int) -> NDArray[np.int64]:
        """``count`` different places (not more than the class has), those of the present pass first."""
        count = min(count, len(self.places))
        taken = self.places[self.used : self.used + count]
        self.used += len(taken)
        if len(taken) == count:
            return taken
        # A new pass: what has just been taken comes last, so that no place is taken twice at a time.
        rest = self.generator.permutation(self.places[: self.used - len(taken)])
        self.places = np.concatenate([rest, taken])
        self.used = count - len(taken)
        return np.concatenate([taken, self.places[: self.used]])


class _ClassPasses:
    """Numbers of classes, each as often as every other."""

    def __init__(self, count: int, generator: np.random.Generator) -> None:
        self.count, self.generator = count, generator
        self.queue: list[int] = []

    def begin(self, most: int) -> None:
        """A batch begins; whatever it needs, the pass goes on where it was."""

    def next(self, present: Collection[int]) -> int:
        """The next class of the pass that is not in the batch yet; the batch must lack one."""
        while True:
            for at in range(len(self.queue) - 1, -1, -1):
                if self.queue[at] not in present:
                    return self.queue.pop(at)
            self.queue = self.generator.permutation(self.count).tolist() + self.queue


class _GroupPasses:
    """Numbers of classes, group by group.

    A batch takes as many whole groups as it has room for (B3 mixes random groups in a batch), and what is still missing from one more,
    which waits as a whole for the next batch. Of a group that is larger than a batch, random parts go to different batches.
    Where groups overlap, as neighbourhoods do, a pass skips the neighbourhood of a class that it has already shown: so every class is
    shown in a pass, and popular ones not much more often.
    """

    def __init__(self, groups: Sequence[NDArray[np.int64]], generator: np.random.Generator) -> None:
        self.groups, self.generator = groups, generator
        self.overlap = sum(map(len, groups)) > len(np.unique(np.concatenate(groups)))
        self.waiting: list[list[int]] = []  # parts of groups that the pass has still to show; one is drawn from its end
        self.part: list[int] = []
        self.left: list[int] = []  # of the part that is being shown
        self.shown: set[int] = set()
        self.most, self.parts_of_batch = 1, 0

    def begin(self, most: int) -> None:
        """A batch of at most so many classes begins."""
        if self.left and self.parts_of_batch > 1:
            self.waiting.append(self.part)
        elif self.part:
            self.shown.update(self.part)
        self.part, self.left = [], []
        self.most, self.parts_of_batch = most, 0

    def next(self, present: Collection[int]) -> int:
        """The next class that is not in the batch yet; the batch must lack one."""
        while True:
            while self.left:
                if (chosen := self.left.pop()) not in present:
                    return chosen
            self.shown.update(self.part)
            self._next_part()

    def _next_part(self) -> None:
        while self.waiting:
            self.part = self.waiting.pop()
            if not (self.overlap and self.part[0] in self.shown):
                self.left = self.part.copy()
                self.parts_of_batch += 1
                return
        self.part = []
        self.shown.clear()
        parts = [part for group in self.groups for part in self._parts(group)]
        self.waiting = [parts[at] for at in self.generator.permutation(len(parts))]

    def _parts(self, group: NDArray[np.int64]) -> list[list[int]]:
        """A group in random order, cut where it is larger than a batch. A neighbourhood's own class stays first."""
        own = int(self.overlap)
        order = np.concatenate([group[:own], self.generator.permutation(group[own:])])
        return [part.tolist() for part in np.array_split(order, -(-len(order) // self.most))]


class Drawn:
    """The batches of one learner.

    Args:
        places: (n,) of its rows in the training view.
        labels: of the view.
        generator: of everything random here.
        groups: labels of the classes of each group; every class of the learner is in one at least. None: batches are of random classes.
    """

    def __init__(
        self,
        places: NDArray[np.int64],
        labels: NDArray[np.int64],
        generator: np.random.Generator,
        groups: Sequence[NDArray[np.integer]] | None = None,
    ) -> None:
        self.num_rows = len(places)
        self.generator = generator
        shuffled = places[generator.permutation(len(places))]
        ordered = shuffled[np.argsort(labels[shuffled], kind="stable")]
        bounds = np.flatnonzero(np.diff(labels[ordered])) + 1
        self.classes = [_ClassPlaces(part, generator) for part in np.split(ordered, bounds)]
        for part in self.classes:
            part.used = 0  # the first pass is already in random order
        self.passes: _ClassPasses | _GroupPasses = _ClassPasses(len(self.classes), generator)
        if groups is not None:
            own = labels[ordered[np.concatenate([[0], bounds])]]
            self.passes = _GroupPasses([np.searchsorted(own, group) for group in groups], generator)

    def batch(self, count: int, samples_per_class: int) -> NDArray[np.int64]:
        """Places of ``count`` different rows, or of all that there are: classes by ``samples_per_class``, then more of the same classes."""
        count = min(count, self.num_rows)
        present: dict[int, NDArray[np.int64]] = {}
        missing = count
        self.passes.begin(max(1, count // samples_per_class))
        # A class that could give a single row would bring anchors without a positive: present classes give it instead.
        while missing and len(present) < len(self.classes) and (missing > 1 or not self._has_more(present)):
            chosen = self.passes.next(present)
            present[chosen] = self.classes[chosen].take(min(samples_per_class, missing))
            missing -= len(present[chosen])
        while missing:
            for chosen, taken in present.items():
                more = min(samples_per_class, missing, len(self.classes[chosen].places) - len(taken))
                if more:
                    others = np.setdiff1d(self.classes[chosen].places, taken)
                    present[chosen] = np.concatenate([taken, self.generator.permutation(others)[:more]])
                    missing -= more
        return np.concatenate([present[chosen] for chosen in sorted(present)])

    def _has_more(self, present: dict[int, NDArray[np.int64]]) -> bool:
        return any(len(taken) < len(self.classes[chosen].places) for chosen, taken in present.items())
