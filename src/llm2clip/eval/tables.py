"""A table of a report, and how numbers stand in it."""

from __future__ import annotations

from dataclasses import dataclass, field

DIRECTIONS = {"i2t": "image → text", "t2i": "text → image"}


@dataclass(frozen=True)
class Table:
    """A titled table; `numbers` is the first column that is right-aligned."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    numbers: int = 1


def percent(fraction: float, *, digits: int = 1) -> str:
    """A fraction in per cent.

    >>> percent(0.4567), percent(0.0002, digits=3)
    ('45.7', '0.020')
    """
    return f"{100 * fraction:.{digits}f}"
