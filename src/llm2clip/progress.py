"""Progress of a long job: a bar with rate and time left on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger("llm2clip")
Item = TypeVar("Item")
LOG_EVERY_SECONDS = 15.0


class Progress:
    """Counts work done; call `advance`. On a terminal a bar, otherwise a log line every 15 seconds and at the end.

    Args:
        total: units in all, or None if unknown.
        description: what is being done ("encode").
        unit: what is counted ("captions").
        initial: units done by an earlier run; they do not count for the rate.

    Example:
        >>> with Progress(2, description="count", unit="items") as progress:
        ...     progress.advance(2)
    """

    def __init__(self, total: int | None, *, description: str, unit: str, initial: int = 0) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done = self._initial = initial
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=description, unit=f" {unit}", initial=initial, dynamic_ncols=True)

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Count `count` more units; `note` (a loss, say) stands at the end of the bar or line."""
        self.done += count
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= LOG_EVERY_SECONDS:
            self._line(note)

    def _line(self, note: str = "") -> None:
        self._last_line = time.monotonic()
        rate = (self.done - self._initial) / max(self._last_line - self._start, 1e-9)
        of = f"/{self.total:,}" if self.total is not None else ""
        left = ""
        if self.total is not None and rate > 0 and self.done < self.total:
            left = f", {duration((self.total - self.done) / rate)} left"
        logger.info(
            "%s: %s%s %s, %.4g/s%s%s",
            self.description,
            f"{self.done:,}",
            of,
            self.unit,
            rate,
            left,
            note and f", {note}",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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


def duration(seconds: float) -> str:
    """`seconds` for a person.

    >>> duration(42), duration(250), duration(7300)
    ('42 s', '4 min 10 s', '2 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
