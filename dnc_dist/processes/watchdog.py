"""Instead of an endless wait for a rank that is stuck: its name, where in the code it is, and the end of the run.

The training says how far this rank is: ``phase`` begins work that may take long or that one rank does alone (engine.timeout),
``beat`` and ``step`` say that a block or a step is done, so that the next one is due soon (engine.stall_timeout). A thread of
every rank puts that into the ranks' common store every second or two. A rank that made no progress in time reads what all of
them wrote: ranks that work too long or no longer write are named to all, and every rank ends. Nothing is ended while the rank
that the others wait for makes progress.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, TypeVar

from torch.distributed import DistError

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import parse_json, shorten
from dnc_dist.base.wording import listed
from dnc_dist.processes import distributed
from dnc_dist.processes.traces import main_thread, remember_sources

T = TypeVar("T")
_VERDICT = "verdict"
# Of what a rank writes into the store, and of a message.
_MOST_BYTES = 1 << 16
# The timeout of the process groups is a safety net behind this thread, which knows more.
_GROUP_MARGIN_SECONDS = 60.0
_GO_ON = "`--resume auto` goes on from the last checkpoint"


class Mark(NamedTuple):
    """How far a rank is: its ``number``-th sign of life, given at ``what``; ``key`` of the configuration says when the next is due."""

    number: int
    what: str
    key: str


class RankReport(NamedTuple):
    """What a rank writes about itself; ``number`` counts its reports.

    ``age`` seconds since the mark and their ``limit``; ``where`` the main thread is (only if the mark is not quite new), and
    whether it ``waits`` there for others.
    """

    number: int
    rank: int
    host: str
    pid: int
    what: str
    key: str
    age: float
    limit: float
    where: str
    waits: bool

    @property
    def name(self) -> str:
        """The rank, as messages call it."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def overdue(self) -> bool:
        """Whether its next sign of life should have come."""
        return self.age >= self.limit


def diagnose(reports: Sequence[RankReport], silent: Collection[int]) -> str | None:
    """Which ranks keep the others waiting; None: none does, some rank makes progress.

    Args:
        reports: the newest of every rank.
        silent: ranks that no longer write reports.
    """
    lost = [f"{report.name} does not answer; it was last seen in {report.what}" for report in reports if report.rank in silent]
    answering = [report for report in reports if report.rank not in silent]
    working = [report for report in answering if report.overdue and not report.waits]
    stuck = [f"{report.name} has been in {report.where} for {report.age:.0f} s, since {report.what}" for report in working]
    if lost or stuck:
        keeps = ""
        if any(report.waits for report in answering):
            keeps = ", and keeps the other ranks waiting" if len(lost + stuck) == 1 else "; the other ranks wait for them"
        return listed(lost + stuck) + keeps + "".join(f"; raise {key} if that is legitimate" for key in _keys(working))
    if not all(report.overdue for report in answering):
        return None
    places: dict[str, list[RankReport]] = {}
    for report in answering:
        places.setdefault(f"in {report.where}, since {report.what}", []).append(report)
    # The odd one first.
    waiting = sorted(places.items(), key=lambda item: len(item[1]))
    said = [f"{ranks[0].name}{f' and {len(ranks) - 1} more' if len(ranks) > 1 else ''} {place}" for place, ranks in waiting]
    return f"all ranks wait for each other: {listed(said)}; a device or the network between them is stuck"


def _keys(reports: Sequence[RankReport]) -> list[str]:
    return sorted({f"{report.key} (now {report.limit:g} s)" for report in reports})


def read(text: bytes, shape: type[T]) -> T:
    """What a rank wrote into the store of all. The store has no lock: on several machines, who reaches its port can write there, too.

    Raises:
        InputError: no rank of a run writes such a thing.
    """
    source = "what a rank wrote about itself in the store of the ranks"
    if len(text) > _MOST_BYTES:
        raise InputError(f"{source} is damaged: {len(text):,} bytes")
    return parse_json(text, shape, source)


class Watchdog:
    """The threads of one rank."""

    def __init__(self, timeout: float, stall_timeout: float, end: Callable[[str, bool, float], None]) -> None:
        self.limits = {"engine.timeout": timeout, "engine.stall_timeout": stall_timeout}
        self.mark = Mark(0, "start-up", "engine.timeout")
        self.group_limit = 0.0
        self._end = end
        self._rank, self._world = distributed.rank(), distributed.world_size()
        self._host, self._pid, self._on_gpu = socket.gethostname(), os.getpid(), distributed.device().type == "cuda"
        self._store = distributed.store("watchdog")
        self._tick = min(max(stall_timeout / 20, 0.1), 2.0)
        # So long a rank or the store may be busy before it counts as silent.
        self._patience = min(max(stall_timeout / 10, 2.0), 30.0)
        # Seconds since a mark, always read and written together with the mark that they belong to.
        self._since = (self.mark, 0.0)
        self._unanswered = 0.0
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=part, daemon=True, name="watchdog") for part in (self._count, self._exchange)]

    def start(self) -> None:
        """Collective. Begin to watch."""
        remember_sources()
        self._store.set(str(self._rank), json.dumps(self._report(0)))
        distributed.barrier()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Collective. Watch no longer; when it returns, no rank's threads use the store, which one of the processes may hold."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(self._patience)
        distributed.barrier()

    def limit_groups(self, seconds: float) -> None:
        """Set the timeout of all process groups behind the limit of this thread."""
        self.group_limit = seconds
        distributed.set_timeout(seconds + _GROUP_MARGIN_SECONDS)

    def _count(self) -> None:
        """Count the seconds since the last mark, and since the store answered, which no thread can that is waiting for it."""
        last = time.monotonic()
        while not self._stopping.wait(self._tick):
            now, mark = time.monotonic(), self.mark
            # Time in which this whole process was stopped or starved is not the training's.
            passed, last = min(now - last, self._tick + 1.0), now
            counted, age = self._since
            self._since = (mark, age + passed if mark is counted else 0.0)
            self._unanswered += passed
            report = self._report(0)
            if report.overdue and self._unanswered >= self._patience:
                host = os.environ.get("MASTER_ADDR", "?")
                self._end(
                    f"{report.name} has been in {report.where} for {report.age:.0f} s, since {report.what}, and neither rank 0 nor the "
                    f"store of the ranks on its machine ({host}) answers: it is stopped, down or cut off; {_GO_ON}",
                    True,
                    0.0,
                )

    def _exchange(self) -> None:
        """Talk to the store until there is none."""
        try:
            self._talk()
        except DistError:
            # It ended with the process that held it. The main thread will see what that means; if not, the other thread ends the wait.
            return
        except InputError as error:
            self._end(f"{error}; {_GO_ON}", True, 0.0)

    def _talk(self) -> None:
        """Write this rank's report, read the verdict; overdue, read all reports twice and pass a verdict."""
        before: list[RankReport] | None = None
        read_at = 0.0
        for number in itertools.count(1):
            if self._stopping.wait(self._tick):
                return
            report = self._report(number)
            self._store.set(str(self._rank), json.dumps(report))
            if self._store.check([_VERDICT]):
                self._obey(self._store.get(_VERDICT))
            self._unanswered = 0.0
            if report.age < report.limit - self._patience:
                before = None
            elif before is None or (report.overdue and report.age - read_at >= self._patience):
                keys = [str(rank) for rank in range(self._world)]
                now = [read(text, RankReport) for text in self._store.multi_get(keys)]
                if before is not None:
                    silent = [new.rank for old, new in zip(before, now, strict=True) if new.number == old.number]
                    if text := diagnose(now, silent):
                        self._obey(self._store.compare_set(_VERDICT, "", json.dumps([self._rank, text])))
                before, read_at = now, report.age

    def _report(self, number: int) -> RankReport:
        mark, (counted, age) = self.mark, self._since
        age = age if mark is counted else 0.0
        where, waits = main_thread(self._on_gpu) if age > 0 else ("", False)
        return RankReport(
            number, self._rank, self._host, self._pid, mark.what, mark.key, round(age, 1), self.limits[mark.key], where, waits
        )

    def _obey(self, verdict: bytes) -> None:
        """End this process; the rank that passed the verdict speaks for all."""
        author, text = read(verdict, tuple[int, str])
        # The others have yet to read it, from a store that may end with this process.
        self._end(f"{text if text.isprintable() else shorten(text, 1000)}; {_GO_ON}", author == self._rank, 2 * self._tick)


_active: Watchdog | None = None


def start(timeout: float, stall_timeout: float, end: Callable[[str, bool, float], None]) -> None:
    """Collective. Watch the ranks from now on; a single rank waits for nobody and is not watched.

    Args:
        timeout: seconds until the next sign of life after ``phase``.
        stall_timeout: seconds until the next one after ``beat`` and ``step``.
        end: ends the process; takes the diagnosis, whether this rank should say it, and seconds to wait before the end.
    """
    global _active
    if distributed.world_size() > 1:
        _active = Watchdog(timeout, stall_timeout, end)
        _active.start()


def stop() -> None:
    """Collective. The work is done: watch no longer."""
    global _active
    if _active is not None:
        _active.stop()
        _active = None


def phase(what: str) -> None:
    """All ranks begin something that may take long, or that one of them does alone."""
    if _active is not None:
        _active.mark = Mark(_active.mark.number + 1, what, "engine.timeout")
        # Also if it was so long before: there may be new groups.
        _active.limit_groups(_active.limits["engine.timeout"])


def beat(what: str) -> None:
    """This rank has finished a block of many, and the next one should take no longer."""
    if _active is not None:
        _active.mark = Mark(_active.mark.number + 1, what, "engine.stall_timeout")


def step(what: str) -> None:
    """This rank has finished a step; as all ranks meet in every step, the process groups have the short timeout, too."""
    beat(what)
    if _active is not None and _active.group_limit != _active.limits["engine.stall_timeout"]:
        _active.limit_groups(_active.limits["engine.stall_timeout"])
