"""The schedule of an epoch that is read from front to back: which rows make up each step, planned before a byte is read.

The shards, in a new random order, are one long line of rows. It is cut at class borders into *lanes* of about as many rows, which are
read side by side. What has arrived waits in pools of a bounded number of bytes, and steps are made of what is there. All this is
simulated from the index: the plan is a pure function of seed, epoch and division, whatever the number of ranks and workers; those
only decide who reads which lanes. So every rank knows every step, and a resume needs the number of steps done, as with an index.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from dnc_dist.base.errors import InputError
from dnc_dist.base.rng import numpy_generator, seed_for
from dnc_dist.data.batching import EpochSchedule
from dnc_dist.data.stream_pools import Gathered, Lane, Limits, Pools


@dataclass(frozen=True)
class StreamSchedule(EpochSchedule):
    """The steps of an epoch whose rows are read lane by lane.

    ``lane_of_slot`` (like ``places``) int64, ascending within a learner; ``reading[lane]`` (n,) places in the order in which they are
    read, those that no step uses included.
    """

    lane_of_slot: NDArray[np.int64]
    reading: list[NDArray[np.int64]]

    @property
    def left_over(self) -> int:
        """Rows that an epoch reads and no step uses; those that the division leaves out are not among them."""
        return sum(map(len, self.reading)) - len(self.places)

    @property
    def lanes(self) -> int:
        """How many lanes there are, empty ones included."""
        return len(self.reading)

    def _cuts(self, step: int, world: int) -> list[int]:
        """Slots of the step that the ranks before each rank have; world + 1 numbers."""
        lanes = self.lane_of_slot[self.starts[step] : self.starts[step + 1]]
        return np.searchsorted(lanes, lanes_of_ranks(self.lanes, world)).tolist()

    def local_slots(self, step: int, rank: int, world: int) -> tuple[int, int]:
        """The slots [start, stop) of the rows that come from a rank's lanes; they may be none."""
        cuts = self._cuts(step, world)
        return cuts[rank], cuts[rank + 1]

    def rows_of_ranks(self, step: int, rank: int, world: int) -> list[int]:
        """Batch rows of every rank of the rank's group (without groups: of every rank), the dummy of one without rows included."""
        rows, learners = self.rows_of_world(step, world), self.turns.shape[1]
        if learners > 1 and world % learners == 0:
            ranks = world // learners
            return rows[rank // ranks * ranks :][:ranks]
        return rows

    def rows_of_world(self, step: int, world: int) -> list[int]:
        """Batch rows of every rank; dummies included."""
        return np.maximum(np.diff(self._cuts(step, world)), 1).tolist()

    def summary(self, world: int, batch_size: int) -> str:
        """What becomes of the images of the epoch, in words."""
        rows, total = len(self.places), len(self.places) + self.left_over
        smaller = int((np.diff(self.starts) < batch_size).sum())
        most = max(max(self.rows_of_world(step, world)) for step in range(len(self)))
        return (
            f"{len(self)} steps of {rows:,} images; {self.left_over:,} ({self.left_over / total:.2%}) fit into none; "
            f"{smaller} steps are smaller than {batch_size}; a rank has {most} images of a step at most"
        )


def lanes_of_ranks(lanes: int, world: int) -> NDArray[np.int64]:
    """The first lane of each rank, and the number of lanes: contiguous balanced runs, (world + 1,)."""
    return np.arange(world + 1) * lanes // world


def cut_into_lanes(
    shards: NDArray[np.integer], labels: NDArray[np.int64], wanted: NDArray[np.bool_], lanes: int, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """The wanted places in reading order, lane by lane; no class is in two lanes where its rows stand together.

    Args:
        shards: (n,) of each place, ascending.
        labels: (n,) of each place.
        wanted: (n,) which places are read at all.
        lanes: how many; some stay empty if there are fewer classes.
        generator: of the order of the shards.
    """
    parts = np.split(np.arange(len(shards)), np.flatnonzero(np.diff(shards)) + 1)
    line = np.concatenate([parts[at] for at in generator.permutation(len(parts))])
    line = line[wanted[line]]
    borders = np.concatenate([[0], np.flatnonzero(np.diff(labels[line])) + 1, [len(line)]])
    targets = np.arange(1, lanes) * len(line) / lanes
    after = np.clip(np.searchsorted(borders, targets), 1, len(borders) - 1)
    nearest = np.where(targets - borders[after - 1] < borders[after] - targets, borders[after - 1], borders[after])
    return np.split(line, nearest)


def _collect(lanes: list[Lane], limits: Limits, learner: int, count: int, samples_per_class: int, random: Random) -> Gathered:
    """``count`` rows of a learner, spread evenly over a run of lanes, so that every part of the run gives about its share."""
    run = limits.run
    batch, width = Gathered(learner, count, limits, random), len(run)
    start, given = int(random.random() * width), 0
    for number in range(width):
        at = run[(start + number) % width]
        # What the lanes before could not give, the next ones give, two classes more at most: no rank should have much more than its share.
        due = min(count * (number + 1) / width - given, count / width + 2 * samples_per_class)
        while due >= samples_per_class / 2 and (rows := batch.take_from(at, lanes[at])):
            due, given = due - rows, given + rows
    at, idle = start, 0
    while batch.missing >= 2 and idle < width:
        lane = run[at % width]
        at, idle = at + 1, 0 if batch.take_from(lane, lanes[lane]) else idle + 1
    batch.fill_up(lanes, samples_per_class)
    return batch


def _next_turn(pools: Pools, runs: list[Limits], count: int) -> list[int] | None:
    """A learner for each run of lanes, no two alike: those for which most rows wait; None where one could not give half its share.

    A learner comes first that can fill its share by S rows of a class, then one that can by more of a class, then one with half of it.
    """
    from scipy.optimize import linear_sum_assignment  # here, as it takes long to import and most runs read by offset

    waiting, ready = (np.stack([limits.within(rows) for limits in runs]) for rows in (pools.waiting, pools.ready))
    classes = np.stack([pools.classes[limits.run.start : limits.run.stop].sum(0) for limits in runs])
    grade = np.where(ready >= count, 3, np.where(waiting >= count, 2, np.where(waiting >= max(count // 2, 2), 1, 0)))
    grade[classes < 2] = 0
    # The higher grade, whatever waits.
    score = np.where(grade > 0, grade * (1 + waiting.max()) + waiting, -(10**12))
    chosen = linear_sum_assignment(score, maximize=True)[1] if len(runs) > 1 else score.argmax(1)
    return chosen.tolist() if (grade[np.arange(len(runs)), chosen] > 0).all() else None


def stream_schedule(
    learner_of: NDArray[np.integer],
    labels: NDArray[np.int64],
    shards: NDArray[np.integer],
    sizes: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    samples_per_class: int,
    learners_per_step: int = 1,
    lanes: int = 64,
    pool_bytes: int = 512 * 2**20,
) -> StreamSchedule:
    """The schedule of an epoch that reads every row at most once, from front to back; a pure function of its arguments.

    The learner for which most rows wait takes its turn, so that learners take turns as often as they have rows. A batch is made of
    classes by ``samples_per_class`` (S), spread over all lanes; a class gives S + 1 where one row would stay behind alone. What no
    batch can be made of at the end is left over, for other rows in every epoch, since the shards come in another order.

    Args:
        learner_of: (n,) the learner of each place of the training view; -1 is left out.
        labels: (n,) labels of the view.
        shards: (n,) the shard of each place, ascending.
        sizes: (n,) bytes of each encoded image.
        batch_size: rows of a step over all ranks; each of the m learners of a step has ``batch_size // m``. Near the end of an epoch a
            step may have fewer, half as many at least.
        samples_per_class: S of P x S.
        learners_per_step: m, at most the number of learners that have rows. Lanes form m equal runs, each for one learner of the step.
        lanes: how many parts are read side by side.
        pool_bytes: that wait in all lanes together at most; each lane has its share.

    Raises:
        InputError: not one batch can be made of what the pools can hold.
    """
    learners = np.unique(learner_of[learner_of >= 0])
    m = min(learners_per_step, len(learners))
    reading = cut_into_lanes(shards, labels, learner_of >= 0, lanes, numpy_generator(seed, "shards", epoch))
    room = max(pool_bytes // lanes, 1)
    dense = np.searchsorted(learners, learner_of)
    under_way = [Lane(part, dense[part], labels[part], sizes[part], room) for part in reading]
    pools = Pools(lanes, len(learners))
    for at, lane in enumerate(under_way):
        lane.expect(pools, at, samples_per_class)
        lane.fill()
    random = Random(seed_for(seed, "stream", epoch))
    runs = [range(lanes * at // m, lanes * (at + 1) // m) for at in range(m)]
    share = batch_size // m
    limits = [Limits(run, share, samples_per_class) for run in runs]
    slots: list[tuple[int, int, int]] = []
    turns, counts = [], []
    while turn := _next_turn(pools, limits, share):
        batches = [_collect(under_way, part, learner, share, samples_per_class, random) for learner, part in zip(turn, limits, strict=True)]
        for batch in batches:
            slots += sorted((at, label, place) for label, (at, taken) in batch.parts.items() for place in taken)
            for at in {at for at, _ in batch.parts.values()}:
                under_way[at].fill()
        turns.append(learners[turn])
        counts.append([share - batch.missing for batch in batches])
    if not turns:
        raise InputError(
            f"pools of {pool_bytes / 2**20:.1f} MB in {lanes} lanes hold half a batch of {share} images for no learner; set data.pool_mb "
            "higher, schedule.batch_size or division.num_learners lower, or read with data.access=indexed"
        )
    sizes_of_steps = np.array(counts, np.int64)
    return StreamSchedule(
        np.array([slot[2] for slot in slots], np.int64),
        np.concatenate([[0], np.cumsum(sizes_of_steps.sum(1))]).astype(np.int64),
        np.array(turns, np.int64),
        sizes_of_steps,
        np.array([slot[0] for slot in slots], np.int64),
        reading,
    )
