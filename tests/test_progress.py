"""Progress in a log: at once, early once the rate is known, then rarely; time left by work, not by count."""

from __future__ import annotations

import io
import logging
import math
import sys

import pytest

from llm2clip import progress as progress_module
from llm2clip.progress import Progress, Silence, human_bytes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as the tests set it."""
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """What was logged since the last look."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # no terminal
    caplog.set_level(logging.INFO, "llm2clip")

    def look() -> list[str]:
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return look


def test_a_line_at_once_two_early_ones_then_every_15_seconds_and_at_the_end(clock: list[float], lines) -> None:
    with Progress(200, description="count", unit="items") as progress:
        assert lines() == ["count: 0/200 items"]
        for clock[0] in range(1, 37):
            progress.advance()
        assert lines() == [
            "count: 1/200 items, 1/s, 3 min 19 s left",
            "count: 5/200 items, 1/s, 3 min 15 s left",
            "count: 20/200 items, 1/s, 3 min 0 s left",
            "count: 35/200 items, 1/s, 2 min 45 s left",
        ]
    assert lines() == ["count: 36/200 items, 1/s, 2 min 44 s left"]


def test_an_early_estimate_and_once_more(clock: list[float], lines) -> None:
    with Progress(1000, description="count", unit="items") as progress:
        lines()
        seen = []
        for tick in range(1, 121):
            clock[0] = tick / 4
            progress.advance(2)
            seen += [clock[0]] * len(lines())
    assert seen == [1.0, 5.0, 20.0]


def test_a_first_batch_that_takes_long_is_told_when_it_ends(clock: list[float], lines) -> None:
    with Progress(1000, description="count", unit="items", initial=500) as progress:
        assert lines() == ["count: 500/1,000 items"]
        clock[0] = 60.0
        progress.advance(0)  # nothing done, nothing known
        assert lines() == []
        progress.advance(50)
        progress.advance(50)
        assert lines() == ["count: 550/1,000 items, 1.2 s each, 9 min 0 s left"]


def test_time_left_goes_by_work(clock: list[float], lines) -> None:
    """The first 10 of 100 are as much work as 40 of the mean: 60 of 100 are left after 40 s, not 90 of them."""
    with Progress(100, description="count", unit="items") as progress:
        lines()
        clock[0] = 40.0
        progress.advance(10, work=40.0)
        assert lines() == ["count: 10/100 items, 4 s each, 1 min 0 s left"]
        clock[0] = 90.0
        progress.advance(90, work=60.0)
        assert lines() == ["count: 100/100 items, 1.111/s"]


def test_the_size_so_far_and_in_all(clock: list[float], lines) -> None:
    with Progress(4000, description="count", unit="items", unit_bytes=8192) as progress:
        assert lines() == ["count: 0/4,000 items, 0 B of 32.8 MB"]
        clock[0] = 20.0
        progress.advance(1000, note="loss 3")
        assert lines() == ["count: 1,000/4,000 items, 50/s, 8.19 MB of 32.8 MB, 1 min 0 s left, loss 3"]


def test_a_run_that_fails_says_nothing_at_the_end(clock: list[float], lines) -> None:
    with pytest.raises(RuntimeError), Progress(2, description="count", unit="items"):
        raise RuntimeError
    assert lines() == ["count: 0/2 items"]


@pytest.fixture
def silence(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> Silence:
    """One that is told of every line, without its thread."""
    monkeypatch.setattr(Progress, "moved", -math.inf)
    logger, made = logging.getLogger("llm2clip"), Silence("bank")
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, made])
    return made


def test_a_silence_is_broken_ever_less_often_until_there_is_a_line(clock: list[float], lines, silence: Silence) -> None:
    said = {}
    for half in range(110):
        clock[0] = half / 2
        if clock[0] == 32:
            logging.getLogger("llm2clip").info("loaded")
        silence.look()
        if messages := lines():
            said[clock[0]] = messages
    told = {now: [f"bank: still at work, nothing new for {now} s"] for now in (5, 10, 20)}
    assert said == {**told, 32: ["loaded"], **{32 + now: line for now, line in told.items()}}


def test_a_progress_has_lines_of_its_own_but_before_it_moves_and_where_it_stands(
    clock: list[float], lines, silence: Silence
) -> None:
    said: dict[float, list[str]] = {}
    with Progress(60, description="encode", unit="captions") as progress:
        for clock[0] in range(200):
            if clock[0] in range(7, 120, 16):  # 7, 23, ... 119
                progress.advance()
            lines()
            silence.look()
            said |= {clock[0]: found} if (found := lines()) else {}
    assert said == {
        5: ["bank: still at work, nothing new for 5 s"],
        179: ["bank: still at work, nothing new for 1 min 0 s"],
    }
    lines()
    for clock[0] in range(200, 206):
        silence.look()
        said |= {clock[0]: found} if (found := lines()) else {}
    assert said[204] == ["bank: still at work, nothing new for 5 s"] and len(said) == 3, "its end was a line, at 199"


def test_sizes_for_a_person() -> None:
    assert [human_bytes(n) for n in (0, 999, 8192, 94e9, 16.4e12, 5e15)] == [
        "0 B",
        "999 B",
        "8.19 kB",
        "94 GB",
        "16.4 TB",
        "5e+03 TB",
    ]
