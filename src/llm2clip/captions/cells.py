"""Pictures embedded in Parquet and Arrow tables: one cell by file, row and column, with a small cache."""

from __future__ import annotations

import bisect
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.captions.bad import BadPicture
from llm2clip.captions.reading import MAX_PICTURE_BYTES, filesystem_of, is_url
from llm2clip.captions.sample import PictureRef
from llm2clip.captions.specs import suffix

MAX_OPEN_TABLES = 16
"""Tables kept open in each process."""
MAX_ROW_GROUPS = 2
"""Decoded row groups kept for each Parquet file; `datasets` writes groups of 100 rows where there are pictures."""
TABLE_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, IndexError)
"""What pyarrow raises for a damaged or missing file."""


class Cells(Protocol):
    """A table file whose cells can be read one by one."""

    num_rows: int

    def cell(self, row: int, column: str) -> Any:
        """The value at `row` (in the whole file) of `column`."""


class ParquetCells:
    """Cells of a Parquet file; the last row groups read are kept decoded."""

    def __init__(self, path: str) -> None:
        self.file = open_parquet(path)
        sizes = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.num_rows = sum(sizes)
        self._groups: OrderedDict[tuple[int, str], Any] = OrderedDict()

    def cell(self, row: int, column: str) -> Any:
        """The value at `row` of `column`; reads its row group unless it is at hand."""
        group = bisect.bisect_right(self.starts, row) - 1
        key = (group, column)
        if key not in self._groups:
            self._groups[key] = self.file.read_row_group(group, columns=[column], use_threads=False).column(column)
            if len(self._groups) > MAX_ROW_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key][row - self.starts[group]].as_py()


class ArrowCells:
    """Cells of an Arrow file as `datasets` writes it: memory-mapped, nothing is read before it is asked for."""

    def __init__(self, path: str) -> None:
        self.table = open_arrow(path)
        self.num_rows = self.table.num_rows

    def cell(self, row: int, column: str) -> Any:
        """The value at `row` of `column`."""
        return self.table.column(column)[row].as_py()


def open_parquet(path: str) -> pq.ParquetFile:
    """A Parquet file, local or behind a URL; any error is pyarrow's or the file system's (`TABLE_ERRORS`)."""
    if is_url(path):
        filesystem, inner = filesystem_of(path)
        return pq.ParquetFile(filesystem.open(inner, "rb"))
    return pq.ParquetFile(path, memory_map=True)


def open_arrow(path: str) -> pa.Table:
    """An Arrow stream (or file) as a memory-mapped table; any error is one of `TABLE_ERRORS`."""
    source = pa.memory_map(path)
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()


class OpenTables(threading.local):
    """The tables read last, by path; each thread and each forked child opens its own.

    Args:
        limit: tables kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._pid = os.getpid()
        self._tables: OrderedDict[str, Cells] = OrderedDict()

    def get(self, path: str) -> Cells:
        """The open table of `path`."""
        if self._pid != os.getpid():
            self._tables, self._pid = OrderedDict(), os.getpid()
        if path not in self._tables:
            self._tables[path] = ParquetCells(path) if suffix(path) == ".parquet" else ArrowCells(path)
            if len(self._tables) > self.limit:
                self._tables.popitem(last=False)
        self._tables.move_to_end(path)
        return self._tables[path]


_open_tables = OpenTables(MAX_OPEN_TABLES)


def read_cell(ref: PictureRef) -> bytes:
    """The bytes of an embedded picture: a binary cell, or the `bytes` of a `datasets` Image cell.

    Raises:
        BadPicture: if the table, row, column or bytes are missing or damaged.
    """
    if not is_url(ref.path) and not Path(ref.path).is_file():
        raise BadPicture("missing file", ref.path)
    try:
        table = _open_tables.get(ref.path)
        if ref.offset >= table.num_rows:
            raise BadPicture("truncated file", f"{ref.path} has {table.num_rows} rows, row {ref.offset} is asked for")
        value = table.cell(ref.offset, ref.column)
    except TABLE_ERRORS as error:
        raise BadPicture("unreadable file", f"{ref.path}: {error}") from None
    return cell_bytes(value, where=f"{ref.path} row {ref.offset}, column {ref.column}")


def cell_bytes(value: Any, *, where: str) -> bytes:
    """The picture's bytes in a cell's value.

    Raises:
        BadPicture: if the cell holds none.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise BadPicture("no picture", f"{where} holds {type(data).__name__}, no bytes")
    if not data:
        raise BadPicture("empty picture", f"{where} has 0 bytes")
    if len(data) > MAX_PICTURE_BYTES:
        raise BadPicture("picture too large", f"{where}: {len(data)} bytes")
    return data
