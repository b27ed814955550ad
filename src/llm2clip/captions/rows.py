"""Rows of CSV, TSV and JSON tables, one after another, each damaged row told apart."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Collection, Iterator
from typing import Any, TextIO

from llm2clip.captions.reading import filesystem_of, is_url, open_regular, url_errors
from llm2clip.captions.specs import suffix
from llm2clip.errors import SourceError

Row = dict[str, Any] | str
"""A row's values by column, or what is wrong with it."""
NUM_ROWS_PEEKED = 100
"""Rows of a JSON table whose keys are taken for its columns."""
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def open_text(path: str) -> TextIO:
    """A table as text: UTF-8 with or without a byte order mark, or UTF-16 with one; bytes that are no UTF-8 survive.

    Raises:
        SourceError: if it cannot be opened.
    """
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


class CsvTable:
    """A CSV or TSV file with a header line.

    The separator is the one of comma, tab and semicolon that the header has most of (for .tsv always the tab).
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with open_text(path) as file:
            header = file.readline()
        if not header.strip():
            raise SourceError(f"{path} is empty; its first line must name the columns")
        self.separator = "\t" if suffix(path) == ".tsv" else max(",\t;", key=header.count)
        self.columns = [name.strip() for name in next(csv.reader([header], delimiter=self.separator))]

    def rows(self, wanted: Collection[str] = ()) -> Iterator[Row]:
        """The rows below the header with all columns; blank lines are passed over."""
        with open_text(self.path) as file:
            lines = _Lines(file)
            next(lines)
            for fields in self._records(lines):
                if isinstance(fields, list) and len(fields) > len(self.columns):
                    yield f"{len(fields)} fields where the header has {len(self.columns)}"
                elif fields:
                    yield fields if isinstance(fields, str) else dict(zip(self.columns, fields, strict=False))

    def _records(self, lines: _Lines) -> Iterator[list[str] | str]:
        """Fields of each record. A quote that is never closed swallows lines: they are taken again one by one."""
        reader = csv.reader(lines, delimiter=self.separator, strict=True)
        while True:
            lines.taken.clear()
            try:
                yield next(reader)
            except StopIteration:
                return
            except csv.Error:
                for line in list(lines.taken):
                    yield self._single(line)

    def _single(self, line: str) -> list[str] | str:
        try:
            fields = next(csv.reader([line], delimiter=self.separator), [])
        except csv.Error as error:
            return str(error)
        if fields and len(fields) != len(self.columns):
            return f"{len(fields)} fields where the header has {len(self.columns)}, or a quote that is not closed"
        return fields


class _Lines:
    """Lines of a file, remembering those taken since `taken` was cleared."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.taken: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.taken.append(line)
        return line


class JsonTable:
    """A file of JSON objects: one a line, or one list of them."""

    def __init__(self, path: str) -> None:
        self.path = path
        with open_text(path) as file:
            self._is_list = _first_character(file) == "["
        first = [row for row in itertools.islice(self.rows(), NUM_ROWS_PEEKED) if isinstance(row, dict)]
        if not first:
            raise SourceError(f"{path} holds no JSON objects; expected one in each line, or a list of them")
        self.columns = list(dict.fromkeys(key for row in first for key in row))

    def rows(self, wanted: Collection[str] = ()) -> Iterator[Row]:
        """The objects with all keys; blank lines are passed over."""
        with open_text(self.path) as file:
            if self._is_list:
                for value in self._load_list(file):
                    yield value if isinstance(value, dict) else f"{str(value)[:40]!r} is no JSON object"
                return
            for line in file:
                if line.strip():
                    yield _parse_object(line)

    def _load_list(self, file: TextIO) -> list[Any]:
        try:
            values: list[Any] = json.load(file)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{self.path} is damaged JSON ({error}); fetch or write it again") from None
        return values


def _first_character(file: TextIO) -> str:
    while character := file.read(1):
        if not character.isspace():
            return character
    return ""


def _parse_object(line: str) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    return value if isinstance(value, dict) else f"{str(value)[:40]!r} is no JSON object"
