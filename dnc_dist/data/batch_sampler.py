"""The schedule of an epoch as a ``batch_sampler`` for a DataLoader of torch."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from dnc_dist.data.batching import EpochSchedule


class Batches(Sampler[list[int]]):
    """The places of the rows of every step that this rank takes; every rank has as many steps. One learner a step."""

    def __init__(self, schedule: EpochSchedule, rank: int, world: int) -> None:
        self.schedule, self.rank, self.world = schedule, rank, world
        self.learners: list[int] = schedule.turns[:, 0].tolist()
        """The learner of each step, the same on every rank."""

    def __len__(self) -> int:
        return len(self.schedule)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(len(self)):
            first, stop = self.schedule.local_slots(step, self.rank, self.world)
            yield self.schedule[step].places[first:stop].tolist()
