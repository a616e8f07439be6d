"""Progress lines: rare in a log, updating on a terminal, silent where not enabled."""

from __future__ import annotations

import io
from itertools import pairwise

import pytest

from dnc_dist.base.progress import Progress, format_seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(stream: io.StringIO, *, enabled: bool = True) -> str:
    clock = Clock()
    with Progress(enabled, stream, clock=clock).phase("dividing: features", total=300, unit="img") as phase:
        for _ in range(30):
            clock.now += 1.0
            phase.update(10, note="rank 0")
    return stream.getvalue()


def test_a_log_gets_a_line_every_ten_seconds_and_the_last_one() -> None:
    assert run(io.StringIO()).splitlines() == [
        "dividing: features: 100/300 img, 10 img/s, 0:20 left, rank 0",
        "dividing: features: 200/300 img, 10 img/s, 0:10 left, rank 0",
        "dividing: features: 300/300 img, 10 img/s, in 0:30, rank 0",
    ]


def test_what_was_done_before_does_not_count_as_speed() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(True, stream, clock=clock).phase("epoch 3", total=300, done=200) as phase:
        for _ in range(30):
            clock.now += 1.0
            phase.update(2)
    assert stream.getvalue().splitlines()[0] == "epoch 3: 220/300 steps, 2 steps/s, 0:40 left"


def test_a_terminal_gets_one_line_that_updates() -> None:
    text = run(Terminal())
    assert text.count("\n") == 1 and text.endswith("\n")
    assert text.count("\r") == 30
    for earlier, later in pairwise(text.rstrip("\n").split("\r")[1:]):
        assert len(later) >= len(earlier.rstrip()), "a shorter line covers the longer one before it"


def test_silent_where_not_enabled() -> None:
    assert run(Terminal(), enabled=False) == ""


def test_an_exception_leaves_the_last_line() -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Progress(True, stream).phase("x", total=5) as phase:
        phase.update(2)
        raise RuntimeError
    assert stream.getvalue().startswith("x: 2/5 steps")


def test_format_seconds() -> None:
    assert [format_seconds(seconds) for seconds in (0, 59.6, 75, 3675)] == ["0:00", "1:00", "1:15", "1:01:15"]


def test_a_counter_follows_a_function_that_counts_by_itself() -> None:
    stream, clock = io.StringIO(), Clock()
    report = Progress(True, stream, clock=clock).counter("images", "img")
    for done in range(0, 301, 10):
        report(done, 300)
        clock.now += 1.0
    assert stream.getvalue().splitlines()[-1] == "images: 300/300 img, 10 img/s, in 0:30"
    assert len(stream.getvalue().splitlines()) == 3


def test_a_function_that_counts_once_at_its_end_has_a_rate() -> None:
    stream, clock = io.StringIO(), Clock()
    report = Progress(True, stream, clock=clock).counter("search", "queries")
    clock.now += 2.0
    report(300, 300)
    assert stream.getvalue().splitlines() == ["search: 300/300 queries, 150 queries/s, in 0:02"]
