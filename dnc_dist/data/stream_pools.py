"""What has been read and waits for a step: a simulation of the pools, with places in the view instead of bytes."""

from __future__ import annotations

from collections.abc import Container
from random import Random

import numpy as np
from numpy.typing import NDArray


class Pools:
    """How much waits in each lane for each learner, (lanes, learners): rows, classes that can give rows, and what these give at once."""

    def __init__(self, lanes: int, learners: int) -> None:
        self.waiting, self.classes, self.ready = (np.zeros((lanes, learners), np.int64) for _ in range(3))


class _Stock:
    """What has arrived in one lane for one learner, by class.

    A class gives S rows at a time, or S + 1 where otherwise one row would stay behind alone, which no anchor could use.
    """

    def __init__(self, pools: Pools, at: tuple[int, int], samples_per_class: int) -> None:
        self.pools, self.at, self.samples_per_class = pools, at, samples_per_class
        self.arrived: dict[int, list[int]] = {}
        self.rest: dict[int, int] = {}  # rows that have arrived and those that will
        self.ready: list[int] = []  # classes that can give what they are to give

    def portion(self, label: int) -> int:
        """How many rows the class gives next."""
        rest = self.rest[label]
        return rest if rest <= self.samples_per_class + 1 else self.samples_per_class

    def add(self, label: int, place: int) -> None:
        """A row arrives."""
        rows = self.arrived.setdefault(label, [])
        rows.append(place)
        self.pools.waiting[self.at] += 1
        if len(rows) == max(self.portion(label), 2):
            self._get_ready(label)

    def _get_ready(self, label: int) -> None:
        self.ready.append(label)
        self.pools.classes[self.at] += 1
        self.pools.ready[self.at] += self.portion(label)

    def take(self, label: int, count: int, random: Random) -> list[int]:
        """``count`` rows of a class, at random of those that have arrived."""
        rows = self.arrived[label]
        if len(rows) >= max(self.portion(label), 2):
            self.ready.remove(label)
            self.pools.classes[self.at] -= 1
            self.pools.ready[self.at] -= self.portion(label)
        taken = []
        for _ in range(count):
            at = int(random.random() * len(rows))
            rows[at], rows[-1] = rows[-1], rows[at]
            taken.append(rows.pop())
        self.rest[label] -= count
        self.pools.waiting[self.at] -= count
        if len(rows) >= max(self.portion(label), 2):
            self._get_ready(label)
        return taken

    def choose(self, without: Container[int], random: Random) -> int | None:
        """A class that is ready, at random."""
        for _ in range(4):
            if self.ready and (label := self.ready[int(random.random() * len(self.ready))]) not in without:
                return label
        left = [label for label in self.ready if label not in without]
        return left[int(random.random() * len(left))] if left else None


class Lane:
    """A lane while it is read: at most ``room`` bytes of it wait, or one row that is larger."""

    def __init__(
        self, places: NDArray[np.int64], learners: NDArray[np.integer], labels: NDArray[np.int64], sizes: NDArray[np.int64], room: int
    ) -> None:
        self.places, self.learners, self.labels, self.room = places.tolist(), learners.tolist(), labels.tolist(), room
        self.read_bytes = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self.size_of = dict(zip(self.places, sizes.tolist(), strict=True))
        self.read, self.used_bytes = 0, 0
        self.stocks: dict[int, _Stock] = {}

    def expect(self, pools: Pools, lane: int, samples_per_class: int) -> None:
        """Count what will arrive."""
        for learner, label in zip(self.learners, self.labels, strict=True):
            stock = self.stocks.setdefault(learner, _Stock(pools, (lane, learner), samples_per_class))
            stock.rest[label] = stock.rest.get(label, 0) + 1

    def fill(self) -> None:
        """Read on until the room is full or the lane is at its end."""
        while self.read < len(self.places):
            waiting = self.read_bytes[self.read] - self.used_bytes
            if waiting and self.read_bytes[self.read + 1] - self.used_bytes > self.room:
                return
            self.stocks[self.learners[self.read]].add(self.labels[self.read], self.places[self.read])
            self.read += 1

    def take(self, learner: int, label: int, count: int, random: Random) -> list[int]:
        """``count`` rows of a class for a step; room for others."""
        taken = self.stocks[learner].take(label, count, random)
        self.used_bytes += sum(self.size_of[place] for place in taken)
        return taken


class Limits:
    """How many rows of a learner's ``count`` may come from each half, quarter, eighth … of a run of lanes: twice its share and 2 S.

    Whoever reads a part of the lanes, so gets not much more than its share of a step, although parts run dry at different times.
    """

    def __init__(self, run: range, count: int, samples_per_class: int) -> None:
        width = len(run)
        self.run = run
        self.sizes = sorted({-(-width // parts) for parts in (2**power for power in range(1, width.bit_length() + 1))})
        self.most = [2 * count * size // width + 2 * samples_per_class for size in self.sizes]

    def within(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """What of the rows (lanes, learners) of all lanes a step may take, for each learner (learners,)."""
        mine = rows[self.run.start : self.run.stop]
        found = [mine.sum(0)]
        for size, most in zip(self.sizes, self.most, strict=True):
            found.append(np.minimum(np.add.reduceat(mine, np.arange(0, len(mine), size), axis=0), most).sum(0))
        return np.min(found, axis=0)


class Gathered:
    """The rows of one learner in a step, while they are collected from lanes."""

    def __init__(self, learner: int, count: int, limits: Limits, random: Random) -> None:
        self.learner, self.missing, self.limits, self.random = learner, count, limits, random
        self.parts: dict[int, tuple[int, list[int]]] = {}  # label -> lane and places
        self._given = [[0] * -(-len(limits.run) // size) for size in limits.sizes]

    def _room(self, at: int) -> int:
        """How many rows the step may take of a lane."""
        at -= self.limits.run.start
        levels = zip(self.limits.sizes, self.limits.most, self._given, strict=True)
        return min([self.missing, *(most - given[at // size] for size, most, given in levels)])

    def _took(self, at: int, rows: int) -> None:
        self.missing -= rows
        for size, given in zip(self.limits.sizes, self._given, strict=True):
            given[(at - self.limits.run.start) // size] += rows

    def take_from(self, at: int, lane: Lane) -> int:
        """A class of a lane; how many rows it gave."""
        stock = lane.stocks.get(self.learner)
        if stock is None or not stock.ready or (room := self._room(at)) < 2:
            return 0
        one, other = (stock.choose(self.parts, self.random) for _ in range(2))
        if one is None or other is None:
            return 0
        # The one of two with more rows to come: large classes, which take many steps, should not be left for the end.
        label = one if stock.rest[one] >= stock.rest[other] else other
        count = min(stock.portion(label), room)
        if stock.rest[label] - count == 1:
            count -= 1  # no class is left with a single row, which would have no partner
        if count < 2:
            return 0
        self.parts[label] = (at, lane.take(self.learner, label, count, self.random))
        self._took(at, count)
        return count

    def fill_up(self, lanes: list[Lane], samples_per_class: int) -> None:
        """Further rows of the classes that are there, S of each in turn, as long as rows are missing."""
        given = True
        while self.missing and given:
            given = False
            for label, (at, taken) in self.parts.items():
                stock = lanes[at].stocks[self.learner]
                more = min(self._room(at), len(stock.arrived[label]), samples_per_class)
                if stock.rest[label] - more == 1:
                    more -= 1
                if more > 0:
                    taken += lanes[at].take(self.learner, label, more, self.random)
                    self._took(at, more)
                    given = True
