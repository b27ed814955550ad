"""Tables row by row: CSV, TSV, JSON, Parquet and Arrow, with image paths or embedded images."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

import pyarrow as pa

from llm2clip.data.bytes import TABLE_ERRORS, open_arrow, open_parquet, open_regular
from llm2clip.data.columns import merge_columns
from llm2clip.data.urls import filesystem_of, is_url, suffix, url_errors
from llm2clip.errors import SourceError, UsageError, shown

SEPARATOR = re.compile(r"sep=(.)\s*", re.IGNORECASE)
"""A first line with which spreadsheets name what parts the fields."""
NUM_ROWS_PEEKED = 100
"""Rows of a JSON table whose keys are taken for its columns."""
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
TEXT_BATCH_ROWS, IMAGE_BATCH_ROWS = 4096, 64


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read, and why."""

    detail: str


class Table(Protocol):
    """A table, read row by row as often as wanted."""

    columns: list[str]
    images: Collection[str]
    """Columns whose type says that they hold images."""
    embedded: Collection[str]
    """Columns that hold bytes."""

    def rows(self, wanted: Collection[str]) -> Iterator[dict[str, Any] | BadRow]:
        """Every row, with the `wanted` columns at least."""


class CsvTable:
    """A CSV or TSV file with a header line; blank lines are passed over.

    The separator is the one of comma, tab and semicolon that the header has most of (for .tsv always the tab). Read by
    Python's `csv`, as pyarrow's reader makes one good row of all that lies between two stray quotes.
    """

    images: Collection[str] = ()
    embedded: Collection[str] = ()

    def __init__(self, path: str) -> None:
        self.path = path
        taken: list[str] = []
        with open_text(path) as file:
            lines = _noting(file, taken)
            first = next(filter(str.strip, lines), None)
            named = SEPARATOR.fullmatch(first or "")
            if named:
                first = next(filter(str.strip, lines), None)
            if first is None:
                raise SourceError(f"{path} is empty; its first line must name the columns")
            usual = "\t" if suffix(path) == ".tsv" else max(",\t;", key=first.count)
            self.separator = named[1] if named else usual
            try:
                header = next(csv.reader(itertools.chain([first], lines), delimiter=self.separator, strict=True))
            except csv.Error as error:
                raise SourceError(f"{path}: the line that names its columns cannot be read ({error})") from None
        self._num_lines_above = len(taken)
        self._names = [name.strip() for name in header]
        self.columns = list(dict.fromkeys(self._names))

    def rows(self, wanted: Collection[str] = ()) -> Iterator[dict[str, Any] | BadRow]:
        """The rows below the header. A quote never closed swallows lines: they are taken again one by one."""
        with open_text(self.path) as file:
            for _ in range(self._num_lines_above):
                next(file)
            taken: list[str] = []
            reader = csv.reader(_noting(file, taken), delimiter=self.separator, strict=True)
            while True:
                taken.clear()
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error:
                    yield from filter(None, map(self._single, taken))
                    continue
                if len(fields) > len(self._names):
                    yield BadRow(f"{len(fields)} fields where the header has {len(self._names)}")
                elif fields:
                    yield merge_columns(list(zip(self._names, fields, strict=False)))

    def _single(self, line: str) -> dict[str, Any] | BadRow | None:
        try:
            fields = next(csv.reader([line], delimiter=self.separator), [])
        except csv.Error as error:
            return BadRow(str(error))
        if fields and len(fields) != len(self._names):
            wanted = len(self._names)
            return BadRow(f"{len(fields)} fields where the header has {wanted}, or a quote that is not closed")
        return merge_columns(list(zip(self._names, fields, strict=False)))


def _noting(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    """`lines`, each added to `taken` as it is read."""
    for line in lines:
        taken.append(line)
        yield line


class JsonTable:
    """A file of JSON objects: one a line, or one list of them; blank lines are passed over."""

    images: Collection[str] = ()
    embedded: Collection[str] = ()

    def __init__(self, path: str) -> None:
        self.path = path
        first = [row for row in itertools.islice(self.rows(), NUM_ROWS_PEEKED) if isinstance(row, dict)]
        if not first:
            raise SourceError(f"{path} holds no JSON objects; expected one in each line, or a list of them")
        self.columns = list(dict.fromkeys(key for row in first for key in row))

    def rows(self, wanted: Collection[str] = ()) -> Iterator[dict[str, Any] | BadRow]:
        """The objects with all keys."""
        with open_text(self.path) as file:
            first = next((line for line in file if not line.isspace()), "")
            if not first.lstrip().startswith("["):
                lines = itertools.chain([first], file)
                yield from (_object(line) for line in lines if line.strip())
                return
            try:
                values = json.loads(first + file.read(), object_pairs_hook=merge_columns)
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{self.path} is damaged JSON ({error}); fetch or write it again") from None
            yield from map(_is_object, values)


def _object(line: str) -> dict[str, Any] | BadRow:
    try:
        return _is_object(json.loads(line, object_pairs_hook=merge_columns))
    except (ValueError, RecursionError) as error:
        return BadRow(f"no JSON: {error}")


def _is_object(value: Any) -> dict[str, Any] | BadRow:
    return value if isinstance(value, dict) else BadRow(f"{shown(value)} is no JSON object")


class ColumnTable:
    """A Parquet or Arrow file."""

    def __init__(self, path: str) -> None:
        self.path, self._is_parquet = path, suffix(path) == ".parquet"
        try:
            schema = open_parquet(path).schema_arrow if self._is_parquet else open_arrow(path).schema
        except TABLE_ERRORS as error:
            kind = suffix(path)[1:]
            raise SourceError(f"{path} is damaged or no {kind} file ({error}); fetch or write it again") from None
        self.columns: list[str] = list(dict.fromkeys(schema.names))
        if len(self.columns) < len(schema.names):
            name = next(name for name, count in Counter(schema.names).items() if count > 1)
            raise UsageError(f"{path} has several columns called {name!r}; rename them")
        self.images: Collection[str] = [field.name for field in schema if _is_image(field.type)]
        self.embedded: Collection[str] = {*self.images, *(field.name for field in schema if _is_binary(field.type))}

    def rows(self, wanted: Collection[str]) -> Iterator[dict[str, Any] | BadRow]:
        """Every row, with the `wanted` columns."""
        columns = [name for name in self.columns if name in wanted]
        num_rows = IMAGE_BATCH_ROWS if any(name in self.embedded for name in columns) else TEXT_BATCH_ROWS
        try:
            if self._is_parquet:
                batches = open_parquet(self.path).iter_batches(batch_size=num_rows, columns=columns)
            else:
                batches = open_arrow(self.path).select(columns).to_batches(max_chunksize=num_rows)
            for batch in batches:
                yield from batch.to_pylist()
        except TABLE_ERRORS as error:
            raise SourceError(f"{self.path} is damaged ({error}); fetch or write it again") from None


class LinesTable:
    """A text file: each line that is not blank is a row with one column, `text`; for captions without images."""

    images: Collection[str] = ()
    embedded: Collection[str] = ()
    columns: list[str] = ["text"]  # noqa: RUF012 (it is never changed)

    def __init__(self, path: str) -> None:
        self.path = path

    def rows(self, wanted: Collection[str] = ()) -> Iterator[dict[str, Any] | BadRow]:
        """The lines."""
        with open_text(self.path) as file:
            yield from ({"text": line} for line in file if line.strip())


def _is_image(kind: pa.DataType) -> bool:
    """Whether a column is what `datasets` makes of its Image feature: a struct of bytes and path."""
    return pa.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


TABLES: dict[str, Callable[[str], Table]] = {"csv": CsvTable, "tsv": CsvTable, "parquet": ColumnTable}
TABLES |= {"arrow": ColumnTable, **dict.fromkeys(("jsonl", "jsonlines", "ndjson", "json"), JsonTable)}
TABLES["txt"] = LinesTable
"""File name ending -> reader of such a `Table`."""


def open_text(path: str) -> TextIO:
    """A table as text: UTF-8 with or without a byte order mark, or UTF-16 with one; bytes that are no UTF-8 survive."""
    try:
        if is_url(path):
            filesystem, inner = filesystem_of(path)
            binary = io.BufferedReader(filesystem.open(inner, "rb"))
        else:
            binary = open(open_regular(path), "rb")  # noqa: SIM115 (the text file returned closes it)
        if binary.peek(2)[:2] in UTF16_MARKS:
            return io.TextIOWrapper(binary, encoding="utf-16", errors="replace", newline="")
        return io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
    except url_errors() as error:
        raise SourceError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
