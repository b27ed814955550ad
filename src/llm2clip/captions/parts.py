"""What a source is made of: parts, each a file or folder that yields its samples in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from llm2clip.captions.bad import BadSamples
from llm2clip.captions.sample import Sample


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a source is read.

    Attributes:
        captions: kind -> column (or several joined by commas); empty: the usual names.
        image: the picture's column or extension; None: the usual names.
        allow_outside: whether a table may name pictures outside its folder.
        pictures: whether pictures are needed; if not, they are neither looked for nor checked.
    """

    captions: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None
    allow_outside: bool = False
    pictures: bool = True


class Part(Protocol):
    """One file or folder of a source."""

    @property
    def path(self) -> str:
        """Where it lies."""

    @property
    def size(self) -> int | str:
        """What changes when its content does: the bytes of a file, a digest of a folder."""

    def check(self) -> None:
        """Look at its beginning, so that a wrong column or file is told at once, not after hours.

        Raises:
            UsageError: if a column is missing.
            SourceError: if it cannot be read.
        """

    def samples(self, bad: BadSamples) -> Iterator[Sample]:
        """Its good samples, the same order every time; bad ones are counted."""
