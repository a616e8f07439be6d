"""The schedule of an epoch: which rows make up each step, as a pure function of seed, epoch and division (class-balanced P x S batches).

Rows are named by their places in the training view; where a row stands in a step's global batch is its slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dnc_dist.base.rng import numpy_generator
from dnc_dist.data.drawing import Drawn

EpochLength = Literal["dataset", "over"]


class Step(NamedTuple):
    """One step's global batch in canonical order: learner by learner, class by class.

    ``learners`` who take their turn; of each slot the ``places`` (n,) int64 in the training view and the ``learner`` (n,) int64.
    """

    learners: tuple[int, ...]
    places: NDArray[np.int64]
    learner: NDArray[np.int64]


@dataclass(frozen=True)
class EpochSchedule:
    """The steps of an epoch.

    Step t takes turn ``turns[t]`` (m learners); its rows have the places ``places[starts[t]:starts[t + 1]]`` in the training view.
    Learner j of the turn has ``sizes[t, j]`` of them.
    """

    places: NDArray[np.int64]
    starts: NDArray[np.int64]
    turns: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.turns)

    def __getitem__(self, step: int) -> Step:
        if not 0 <= step < len(self):
            raise IndexError(step)
        turn = self.turns[step]
        places = self.places[self.starts[step] : self.starts[step + 1]]
        return Step(tuple(int(learner) for learner in turn), places, np.repeat(turn, self.sizes[step]))

    def _share(self, step: int, rank: int, world: int) -> tuple[int, int, int, int]:
        """First slot and number of slots that some ranks share, the number of ``rank`` among them, and how many they are."""
        sizes = self.sizes[step]
        learners = len(sizes)
        if learners > 1 and world % learners == 0:
            ranks = world // learners
            group, me = divmod(rank, ranks)
            return int(sizes[:group].sum()), int(sizes[group]), me, ranks
        return 0, int(sizes.sum()), rank, world

    def local_slots(self, step: int, rank: int, world: int) -> tuple[int, int]:
        """The slots [start, stop) of the step's global batch that a rank takes; they may be none.

        A contiguous balanced slice. With m > 1 learners a step and m dividing the number of ranks, the ranks form m groups,
        and group j shares the rows of learner j.
        """
        first, count, me, ranks = self._share(step, rank, world)
        return first + count * me // ranks, first + count * (me + 1) // ranks

    def rows_of_ranks(self, step: int, rank: int, world: int) -> list[int]:
        """Batch rows of every rank of the rank's group (without groups: of every rank), the dummy of one without rows included."""
        _, count, _, ranks = self._share(step, rank, world)
        return [max(1, count * (other + 1) // ranks - count * other // ranks) for other in range(ranks)]

    def rows_of_world(self, step: int, world: int) -> list[int]:
        """Batch rows of every rank, also of those that serve other learners; dummies included."""
        ranks = self._share(step, 0, world)[3]
        return [rows for first in range(0, world, ranks) for rows in self.rows_of_ranks(step, first, world)]

    def max_rows_per_class(self, labels: NDArray[np.int64]) -> int:
        """The largest number of rows that one class has in any step, given ``labels`` (n,) of the view."""
        step = np.repeat(np.arange(len(self)), np.diff(self.starts))
        return int(np.unique(np.stack([step, labels[self.places]]), axis=1, return_counts=True)[1].max())


def num_steps(sizes: NDArray[np.int64], num_rows: int, batch_size: int, learners_per_step: int, length: EpochLength) -> int:
    """Steps of an epoch.

    ``dataset``: ``num_rows // batch_size``, whatever the division. ``over``: every learner has as many turns as the largest one
    needs to see all its rows. At least 1 in each case.

    Args:
        sizes: (k,) rows of every learner that has any.
        num_rows: rows of the training set, those left out included.
    """
    if length == "dataset":
        return max(1, num_rows // batch_size)
    share = max(1, batch_size // learners_per_step)
    turns = -(-int(sizes.max()) // share)
    return max(1, -(-turns * len(sizes) // learners_per_step))


def epoch_schedule(
    learner_of: NDArray[np.integer],
    labels: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    samples_per_class: int,
    learners_per_step: int = 1,
    length: EpochLength = "dataset",
    groups: NDArray[np.integer] | None = None,
    hard_share: float = 1.0,
) -> EpochSchedule:
    """The schedule of an epoch; a pure function of its arguments.

    Learners that have rows take turns in fixed cyclic order, ``learners_per_step`` at a time, so that the numbers of their turns
    differ by one at most; an epoch begins where the one before it stopped. Within a learner classes come in passes of a new
    random order, and so do the rows of a class: every class is visited equally often, and each of its rows, too. A batch holds
    no row twice; a learner with fewer rows than its share of the batch gives all it has.

    Which classes share a batch is apart from who trains on it: with ``groups`` close ones do. A *hard* batch is one of the learner's
    classes or groups; the others are of classes of the whole set, and train the learner whose turn it is all the same.

    Args:
        learner_of: (n,) the learner of each place of the training view; -1 is left out, but for batches of the whole set.
        labels: (n,) labels of the view.
        batch_size: rows of a step over all ranks; each of the m learners of a step has ``batch_size // m``.
        samples_per_class: S of P x S.
        learners_per_step: m, at most the number of learners that have rows. With m > 1 and ``hard_share`` below 1 a step may hold a
            row twice, for two learners.
        length: see ``num_steps``.
        groups: (G, n) labels of classes, -1: no more; each of one learner's classes, all classes of a learner in one at least. None:
            hard batches are of the learner's classes at random.
        hard_share: of each learner's batches that are hard, evenly spread over its turns.

    Raises:
        ValueError: no learner has any row (a division never is like this).
    """
    learners, sizes = np.unique(learner_of[learner_of >= 0], return_counts=True)
    if not len(learners):
        raise ValueError("every row of the division is left out: there is nothing to train on")
    m = min(learners_per_step, len(learners))
    steps = num_steps(sizes, len(labels), batch_size, m, length)
    turn = (epoch * steps * m + np.arange(steps * m)).reshape(steps, m)
    turn = np.take_along_axis(turn, np.argsort(turn % len(learners), axis=1), 1)
    order = turn % len(learners)
    hard = is_hard(turn, len(learners), hard_share)
    by_learner = np.argsort(learner_of, kind="stable")[np.count_nonzero(learner_of < 0) :]
    parts = np.split(by_learner, np.cumsum(sizes)[:-1])
    makers = [
        Drawn(part, labels, numpy_generator(seed, "schedule", epoch, int(learner)), _groups_of(labels[part], groups))
        for learner, part in zip(learners, parts, strict=True)
    ]
    # Everything that has a partner of its class somewhere, also what the division leaves out.
    whole = np.flatnonzero(np.bincount(labels)[labels] >= 2)
    anything = Drawn(whole, labels, numpy_generator(seed, "schedule of the whole set", epoch)) if not hard.all() else None
    batches = [
        (makers[at] if is_one or anything is None else anything).batch(batch_size // m, samples_per_class)
        for at, is_one in zip(order.ravel(), hard.ravel(), strict=True)
    ]
    counts = np.array([len(batch) for batch in batches], np.int64).reshape(steps, m)
    starts = np.concatenate([[0], np.cumsum(counts.sum(1))]).astype(np.int64)
    return EpochSchedule(np.concatenate(batches).astype(np.int64), starts, learners[order].astype(np.int64), counts)


def is_hard(turn: NDArray[np.int64], learners: int, share: float) -> NDArray[np.bool_]:
    """Which turns bring a hard batch: of each learner's turns this share, evenly spread, and those of different learners in turn.

    Args:
        turn: numbers of turns since the start of the training; turn t is learner ``t % learners``'s.
        learners: how many take turns.
        share: between 0 and 1.
    """
    own, phase = turn // learners, (turn % learners) / learners
    return np.floor((own + 1) * share + phase) > np.floor(own * share + phase)


def _groups_of(labels: NDArray[np.int64], groups: NDArray[np.integer] | None) -> list[NDArray[np.integer]] | None:
    """The groups of the classes of one learner, whose rows have these labels."""
    if groups is None:
        return None
    return [group[group >= 0] for group in groups[np.isin(groups[:, 0], labels)]]
