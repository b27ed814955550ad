"""A sample: where one picture lies, and its captions by kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
