"""A sample: where one picture lies, and its captions by kind; and the parts of a source that give samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from llm2clip.data.bad import BadSamples


@dataclass(frozen=True, slots=True)
class PictureRef:
    """Where the bytes of one encoded picture lie; small and plain enough for a bank's table.

    Three forms: a whole file (`path`), a byte range of a file such as a tar (`path`, `offset`, `length`), a cell of
    a Parquet or Arrow table (`path`, `column`, `offset` = row number).

    Attributes:
        path: absolute local path, or a URL that fsspec opens.
        offset: first byte in the file; for a table cell the row number.
        length: bytes; -1 means to the end of the file.
        column: column name of a table cell; empty for files and ranges.
    """

    path: str
    offset: int = 0
    length: int = -1
    column: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture and its captions.

    Attributes:
        id: unique within its source: the tar member key, the picture path in a table, the row number.
        picture: where the picture lies; never decoded here.
        captions: kind ("short", "long", "raw", "zh", ...) -> captions of that kind, each stripped and not empty.
    """

    id: str
    picture: PictureRef
    captions: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a source is read.

    Attributes:
        captions: kind -> column (or several joined by commas); empty: the usual names.
        image: the picture's column or extension; None: the usual names.
        allow_outside: whether a table may name pictures outside its folder.
        pictures: whether pictures are needed; if not, they are neither looked for nor checked.
        flag: what errors call the source.
    """

    captions: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None
    allow_outside: bool = False
    pictures: bool = True
    flag: str = "--data"


class Part(Protocol):
    """One file or folder of a source."""

    @property
    def path(self) -> str:
        """Where it lies."""

    @property
    def name(self) -> str:
        """What its samples are called by: its path, unless it has a better name."""

    @property
    def size(self) -> int | str:
        """What changes when its content does: the bytes of a file, a digest of a folder."""

    def check(self) -> None:
        """Look at its beginning, so that a wrong column (UsageError) or file (SourceError) is told at once."""

    def samples(self, bad: BadSamples) -> Iterator[Sample]:
        """Its good samples, the same order every time; bad ones are counted."""
