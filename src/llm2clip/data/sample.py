"""A sample: where one image lies, and its captions by kind; and the parts of a source that give samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from llm2clip.data.bad import BadSamples

BASE64 = "base64"
"""The `column` of a byte range that holds an image as base64."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where the bytes of one encoded image lie; small and plain enough for a bank's table.

    Five forms: a whole file (`path`), a byte range of a file such as a tar (`path`, `offset`, `length`), the same as
    base64 (`column` = BASE64), a cell of a Parquet or Arrow table (`path`, `column`, `offset` = row number), a member
    of a zip (`path`, `column` = its name).
    """

    path: str
    """Absolute local path, or a URL that fsspec opens."""
    offset: int = 0
    length: int = -1
    """Bytes; -1 means to the end of the file."""
    column: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and its captions."""

    id: str
    """Unique within its source: the tar member key, the image path in a table, the row number."""
    image: ImageRef
    captions: Mapping[str, tuple[str, ...]]
    """Kind ("short", "long", "raw", "zh", ...) -> captions of that kind, each stripped and not empty."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a source is read: the settings of `SourceConfig` that its parts need."""

    captions: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None
    image_root: str | None = None
    allow_outside: bool = False
    split: str | None = None
    """Rows of a table whose column `split` says so, or the folder of this name; None for all rows."""
    text_lines: str = "auto"
    """What the lines of a text file are, see `SourceConfig`."""
    images: bool = True
    """Whether images are needed; if not, they are neither looked for nor checked."""
    word: str = "data"
    """What errors call the source: its setting, as the user writes it."""


class Part(Protocol):
    """One file or folder of a source.

    `path` is where it lies, `name` what its samples are called by, and `size` changes when its content does: the bytes
    of a file, a digest of a folder.
    """

    path: str
    name: str
    size: Any

    def check(self) -> str:
        """Look at its beginning, so that a wrong column (UsageError) or file (SourceError) is told at once.

        Returns:
            What is read of it and what is not, for a log; "" if that is not known yet.
        """

    def samples(self, bad: BadSamples) -> Iterator[Sample]:
        """Its good samples, the same order every time; bad ones are counted."""
