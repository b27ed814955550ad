"""Progress of a long job: a bar with rate and time left on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import ClassVar, TypeVar

from tqdm import tqdm

logger = logging.getLogger("llm2clip")
Item = TypeVar("Item")
LOG_EVERY_SECONDS = 15.0
EARLY_SECONDS = (1.0, 4.0)
"""From the start to the first early line, and to the second: long enough for a rate, soon enough to stop a mistake."""
SILENT_SECONDS, STALLED_SECONDS = 5.0, 60.0
"""Without a line, before one says that it goes on; and without an advance of a progress that had begun to."""
MEASURED = 2
"""Units after the first advance, at least, from whose rate a whole job is estimated; in the first one things are
compiled and caches filled."""


class Progress:
    """Counts work done; call `advance`.

    On a terminal a bar; otherwise log lines: one at the start, two as soon as there is a rate, then one every
    15 seconds and one at the end.

    Args:
        total: units in all, or None if unknown.
        description: what is being done ("encode").
        unit: what is counted ("captions").
        initial: units done by an earlier run; they do not count for the rate.
        unit_bytes: bytes that a unit takes on the disk; the size so far and in all is shown.
        estimate: what the job takes besides time, in words, asked once: when there is a rate, a line says both.

    Example:
        >>> with Progress(2, description="count", unit="items") as progress:
        ...     progress.advance(2)
    """

    moved: ClassVar[float] = -math.inf  # when the one that is open advanced

    def __init__(
        self,
        total: int | None,
        *,
        description: str,
        unit: str,
        initial: int = 0,
        unit_bytes: int | None = None,
        estimate: Callable[[], str] | None = None,
    ) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done = self._initial = initial
        self._unit_bytes, self._work = unit_bytes, 0.0
        self._estimate = estimate
        self._first: tuple[float, int, float] | None = None  # when the first units were done, how many, and their work
        self._start = self._last_line = time.monotonic()
        self._waits = [*EARLY_SECONDS, LOG_EVERY_SECONDS]
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=description, unit=f" {unit}", initial=initial, dynamic_ncols=True)

    def advance(self, count: int = 1, *, work: float | None = None, note: str = "") -> None:
        """Count `count` more units.

        Args:
            work: how much of the work they were, in units of the mean size, where they are known to be larger or
                smaller than others; the time left in a log goes by it.
            note: stands at the end of the bar or line (a loss, say).
        """
        Progress.moved = time.monotonic()
        self.done += count
        self._work += count if work is None else work
        if self._bar is not None:
            if note or self._unit_bytes is not None:
                self._bar.set_postfix_str(", ".join(filter(None, [self._size(), note])), refresh=False)
            self._bar.update(count)
        elif self.done > self._initial and time.monotonic() - self._last_line >= self._waits[0]:
            self._waits = self._waits[1:] or self._waits
            self._line(note)
        if self._estimate is not None and self.total is not None and self.done > self._initial:
            self._tell(self._estimate, self.total)

    def _tell(self, estimate: Callable[[], str], total: int) -> None:
        """Say once what the job takes, when enough was done after the first units to know."""
        now = time.monotonic()
        if self._first is None:
            self._first = now, self.done, self._work
        began, done, work = self._first
        if self.done - done < MEASURED or now - began < EARLY_SECONDS[0] or self._work <= work:
            return
        seconds = (now - began) * (total - self._initial - self._work) / (self._work - work)
        if seconds < LOG_EVERY_SECONDS:  # over before it is read
            return
        logger.info("%s: about %s, %s", self.description, duration(seconds), estimate())
        self._estimate = None

    def _line(self, note: str = "") -> None:
        self._last_line = time.monotonic()
        count = self.done - self._initial
        of = f"/{self.total:,}" if self.total is not None else ""
        parts = [
            f"{self.description}: {self.done:,}{of} {self.unit}",
            _rate(count, self._last_line - self._start) if count else "",
            self._size(),
            self._left(),
            note,
        ]
        logger.info("%s", ", ".join(filter(None, parts)))

    def _left(self) -> str:
        """The time left by the work done since the start, if there is any of both."""
        if self.total is None or self.done >= self.total or self._work <= 0:
            return ""
        seconds = (self._last_line - self._start) * (self.total - self._initial - self._work) / self._work
        return f"{duration(max(seconds, 0.0))} left"

    def _size(self) -> str:
        if self._unit_bytes is None or self.total is None:
            return ""
        return f"{human_bytes(self.done * self._unit_bytes)} of {human_bytes(self.total * self._unit_bytes)}"

    def __enter__(self) -> Progress:
        if self._bar is None:
            self._line()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Progress.moved = -math.inf
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._line()


def track(items: Iterable[Item], *, description: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """Yield `items`, showing how far along they are.

    Example:
        >>> list(track([1, 2], description="count", unit="items"))
        [1, 2]
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(total, description=description, unit=unit) as progress:
        for item in items:
            yield item
            progress.advance()


GOES_ON = "%s: still at work, nothing new for %s"


class Silence(logging.Handler):
    """Within `with Silence(what)` a line says that `what` is still at work where there was none for five seconds.

    So it is while torch is imported, a model read or a first batch computed. A `Progress` that advances has lines of
    its own: there it takes a minute. A silence that lasts is broken ever less often.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what, self._over = what, threading.Event()
        self._heard = self._moved = self._told = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Note that there was a line, another's."""
        if record.msg != GOES_ON:
            self._heard = time.monotonic()

    def look(self) -> None:
        """Say that it goes on, if it is time to."""
        now, moved = time.monotonic(), Progress.moved
        self._moved = max(self._moved, moved)
        heard = max(self._heard, self._moved)
        wait = max(SILENT_SECONDS if moved == -math.inf else STALLED_SECONDS, (now - heard) / 2)
        if now - max(heard, self._told) >= wait:
            self._told = now
            logger.info(GOES_ON, self._what, duration(now - heard))

    def _watch(self) -> None:
        while not self._over.wait(SILENT_SECONDS / 20):
            self.look()

    def __enter__(self) -> None:
        logger.addHandler(self)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        logger.removeHandler(self)


def duration(seconds: float) -> str:
    """`seconds` for a person.

    >>> duration(42), duration(250), duration(7300)
    ('42 s', '4 min 10 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def human_bytes(count: float) -> str:
    """A size for a person.

    >>> human_bytes(8192), human_bytes(94e9)
    ('8.19 kB', '94 GB')
    """
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.3g} {units[0]}"


def _rate(count: int, seconds: float) -> str:
    """How fast it goes, with a number above one.

    >>> _rate(30, 4.0), _rate(3, 54.0)
    ('7.5/s', '18 s each')
    """
    return (
        f"{count / max(seconds, 1e-9):.4g}/s"
        if count >= seconds
        else f"{seconds / count:.3g} s each"
        if seconds < 100 * count
        else f"{duration(seconds / count)} each"
    )
