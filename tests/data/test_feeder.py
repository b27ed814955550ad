"""Items are prepared by threads, no more ahead than asked for, and handed out in their order."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from llm2clip.data.bad import BadImage
from llm2clip.data.feeder import batched, prepared


def counted(number: int, taken: list[int]) -> Iterator[int]:
    for i in range(number):
        taken.append(i)
        yield i


@pytest.mark.parametrize("ahead", [0, 1, 3, 50])
def test_in_order_and_no_more_ahead_than_asked_for(ahead: int) -> None:
    taken: list[int] = []
    for number, (item, future) in enumerate(prepared(counted(20, taken), lambda i: i * i, ahead=ahead, threads=3)):
        assert item == number and future.result() == number**2
        assert len(taken) == min(20, number + 1 + ahead)


def test_threads_prepare_while_one_is_used() -> None:
    """The first of four is ready only when the other three have begun, each in a thread of its own."""
    others, names = threading.Barrier(4), set()

    def prepare(item: int) -> int:
        names.add(threading.current_thread().name)
        others.wait(20)
        return item

    feed = prepared(range(4), prepare, ahead=3, threads=4)
    assert [future.result(20) for _, future in feed] == [0, 1, 2, 3] and len(names) == 4


def test_an_error_comes_at_its_items_turn_and_the_others_are_there() -> None:
    def prepare(item: int) -> int:
        if item % 2:
            raise BadImage("empty image", str(item))
        return item

    good, bad = [], []
    for item, future in prepared(range(5), prepare, ahead=9):
        try:
            good.append(future.result())
        except BadImage as error:
            bad.append((item, error.detail))
    assert good == [0, 2, 4] and bad == [(1, "1"), (3, "3")]


def test_what_is_left_waiting_holds_nothing_up() -> None:
    before = threading.active_count()
    feed = prepared(counted(1000, taken := []), lambda i: i, ahead=5)
    next(feed)
    feed.close()
    assert len(taken) == 6 and threading.active_count() == before


def test_batches_whose_futures_are_read_late() -> None:
    batches = list(batched(prepared(range(10), lambda i: -i, ahead=4), 4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert [(item, future.result()) for batch in batches for item, future in batch] == [(i, -i) for i in range(10)]
    assert list(batched([], 3)) == []
