"""Images made ready by threads ahead of the model that reads them: for `LLM2CLIP`, `evaluate`, and validation.

Training has processes instead (`student/loader.py`): what of an image's work holds the interpreter would take it from
the thread that drives the GPU.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
THREADS = min(8, os.cpu_count() or 1)
"""Decoding and resizing let go of the interpreter, so this many images come at once."""


def prepared(
    items: Iterable[T], prepare: Callable[[T], R], *, ahead: int, threads: int = THREADS
) -> Iterator[tuple[T, Future[R]]]:
    """Each item with the future of what `prepare` makes of it, in the order of the items.

    Args:
        ahead: items taken, and prepared by `threads`, beyond the one that is handed out.

    >>> [(item, future.result()) for item, future in prepared("ab", str.upper, ahead=5)]
    [('a', 'A'), ('b', 'B')]
    """
    left = iter(items)
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        while True:
            for item in itertools.islice(left, ahead + 1 - len(waiting)):
                waiting.append((item, pool.submit(prepare, item)))
            if not waiting:
                return
            yield waiting.popleft()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`size` items after another, at the end what is left.

    >>> list(batched("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    left = iter(items)
    while batch := list(itertools.islice(left, size)):
        yield batch
