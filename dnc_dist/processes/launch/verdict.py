"""How a launch ended: what every machine reports, and which of all these endings was the cause."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dnc_dist.base.errors import EXIT_FAILED, EXIT_INPUT, EXIT_STOPPED


@dataclass(frozen=True)
class Failure:
    """The error that a worker recorded (see worker.py); ``traceback`` is empty if the message says all about it."""

    time: float
    exit_code: int
    type: str
    message: str
    traceback: str


@dataclass(frozen=True)
class LaunchReport:
    """How the workers of a launch ended, of one machine or of all.

    Attributes:
        codes: rank -> exit code (negative: killed by that signal; None: had to be ended).
        errors: rank -> the error that it recorded.
        tails: rank -> the end of its stderr, of a rank that failed without a record of its error.
        lost: machine -> why nothing is known of its workers.
    """

    codes: dict[int, int | None] = field(default_factory=dict)
    errors: dict[int, Failure] = field(default_factory=dict)
    tails: dict[int, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    def later(self, seconds: float) -> LaunchReport:
        """The same with the times of all errors moved: by minus the clock they become ages, which machines can exchange."""
        return replace(self, errors={rank: replace(error, time=error.time + seconds) for rank, error in self.errors.items()})

    def __or__(self, other: LaunchReport) -> LaunchReport:
        """Two reports of different machines as one."""
        return LaunchReport(
            self.codes | other.codes,
            self.errors | other.errors,
            self.tails | other.tails,
            self.lost | other.lost,
        )


def _kind(code: int, recorded: bool) -> int:
    """The smaller, the likelier a cause and not a consequence."""
    if code == EXIT_STOPPED:
        return 4
    if recorded:
        return 2
    return 3 if code == -signal.SIGABRT else 0 if code < 0 else 1


def _own_fault(code: int, recorded: bool) -> bool:
    """Whether a worker failed for another reason than that a peer, or itself, was stopped at its start."""
    return code == EXIT_INPUT or (_kind(code, recorded) < 2 and code != -signal.SIGTERM)


def verdict(report: LaunchReport, *, stopping: bool = False, hosts: Mapping[int, str] | None = None) -> tuple[int, str]:
    """Exit code and message for the whole launch: the cause, not what it did to the other ranks.

    A worker that was killed or that left without a record of its error comes first, since a Python error elsewhere is then a
    consequence; then a machine that is gone; then the earliest recorded error; then aborts, with which communication libraries
    react to lost peers. A worker that SIGTERM kills in a requested stop was still starting: then the errors and aborts of others are
    consequences, too, but not wrong input, which every start finds again.

    Args:
        report: how the workers of all machines ended.
        stopping: whether a stop was requested.
        hosts: rank -> its machine, if there are several.
    """
    codes, errors = report.codes, report.errors
    failed = {rank: code for rank, code in codes.items() if code}
    stopped = set(failed.values()) == {EXIT_STOPPED}
    if stopping and -signal.SIGTERM in failed.values():
        causes = {rank: code for rank, code in failed.items() if _own_fault(code, rank in errors)}
        stopped, failed = not causes, causes or failed
    rank = min(
        failed, key=lambda rank: (_kind(failed[rank], rank in errors), errors[rank].time if rank in errors else 0.0, rank), default=None
    )
    if report.lost and codes.get(0) != 0 and (rank is None or _kind(failed[rank], rank in errors) > 1 or stopped):
        gone = "\n".join(f"{machine}: {why}" for machine, why in report.lost.items())
        if stopped:
            return EXIT_STOPPED, f"{gone}; the other workers have stopped"
        # Their errors are consequences, but may tell when it happened.
        return EXIT_FAILED, f"{_cause(rank, failed[rank], report, hosts or {})[1]}\n{gone}" if rank is not None else gone
    if rank is None:
        stuck = ", ".join(str(rank) for rank, code in sorted(codes.items()) if code is None)
        if not stopping or not stuck:
            return 0, ""
        return (
            EXIT_FAILED,
            f"killed before it had stopped: rank {stuck}; the same command goes on from the last checkpoint, if there is one",
        )
    if stopped and EXIT_STOPPED not in codes.values():
        return EXIT_STOPPED, "stopped while the workers started, before there was anything to save; the same command starts again"
    return (EXIT_STOPPED, "") if stopped else _cause(rank, failed[rank], report, hosts or {})


def _cause(rank: int, code: int, report: LaunchReport, hosts: Mapping[int, str]) -> tuple[int, str]:
    """Exit code and message for the rank whose failure was the cause."""
    who = f"rank {rank} on {hosts[rank]}" if rank in hosts else f"rank {rank}"
    error = report.errors.get(rank)
    if error is not None and code == EXIT_INPUT:
        everywhere = {hosts.get(other) for other, found in report.errors.items() if found.message == error.message}
        where = "" if everywhere >= set(hosts.values()) else f"{who}: "
        return EXIT_INPUT, f"error: {where}{error.message}"
    if error is not None and not error.traceback:
        # A RunError: its message names the ranks that it is about, which need not be the one that recorded it.
        return EXIT_FAILED, f"error: {error.message}"
    if error is not None:
        # The message of an error in a loader's process is that process's whole traceback, which has just been shown.
        *_, last = error.message.rstrip().splitlines() or [""]
        brief = last if "in DataLoader worker process" in error.message else f"{error.type}: {error.message}"
        return EXIT_FAILED, f"{error.traceback.rstrip()}\n{who} failed: {brief}"
    ending = f"{who} was killed by {signal.Signals(-code).name}" if code < 0 else f"{who} ended with exit code {code}"
    tail = report.tails.get(rank, "")
    return EXIT_INPUT if code == EXIT_INPUT else EXIT_FAILED, f"{tail}\n{ending}" if tail else ending
