"""Bytes of one image from where it lies: a file, a range of a file, a table cell, or the same behind a URL.

Open files are kept by process, so that a loader's workers read a member of a tar with one system call.
"""

from __future__ import annotations

import base64
import bisect
import errno
import itertools
import os
import stat
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.data.bad import BadImage
from llm2clip.data.sample import BASE64, ImageRef
from llm2clip.data.urls import filesystem_of, is_url, suffix, url_errors

MAX_OPEN_FILES = 64
"""Files (tar shards) kept open in each process."""
MAX_OPEN_TABLES = 16
"""Tables kept open in each thread."""
MAX_ROW_GROUPS = 2
"""Decoded row groups kept for each Parquet file; `datasets` writes groups of 100 rows where there are images."""
MAX_IMAGE_BYTES = 1 << 29
"""Longer encoded images (512 MiB) are refused before they are read."""
TABLE_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, IndexError)
"""What pyarrow raises for a damaged or missing file."""
K = TypeVar("K")
T = TypeVar("T")


def read_bytes(ref: ImageRef, *, limit: int | None = None) -> bytes:
    """The encoded bytes of an image; with a `limit` only so many of a local one.

    Raises:
        BadImage: if it is missing, cut off or no file; the cause says which.
    """
    if ref.column == BASE64 and ref.length >= 0:  # a column of a table may be called so
        return _decoded(ref)
    if ref.column:
        return _read_member(ref) if suffix(ref.path) == ".zip" else _read_cell(ref)
    if ref.length == 0:
        raise BadImage("empty image", f"{ref.path} has 0 bytes" + (f" at {ref.offset}" if ref.offset else ""))
    if ref.length > MAX_IMAGE_BYTES:
        raise BadImage("image too large", f"{ref.path} at {ref.offset}: {ref.length} bytes")
    try:
        data = _read_url(ref) if is_url(ref.path) else _read_local(ref, limit)
    except FileNotFoundError:
        raise BadImage("missing file", ref.path) from None
    except url_errors() as error:
        raise BadImage("unreadable file", f"{ref.path}: {getattr(error, 'strerror', None) or error}") from None
    if 0 <= ref.length < len(data):
        raise BadImage("unreadable file", f"{ref.path}: the server gives whole files only; fetch it to a local disk")
    if len(data) < (ref.length if limit is None else min(ref.length, limit)):
        missing = ref.length - len(data)
        raise BadImage("truncated file", f"{ref.path} ends {missing} bytes before the image at {ref.offset} does")
    if not data:
        raise BadImage("empty image", f"{ref.path} has 0 bytes")
    return data


def _read_local(ref: ImageRef, limit: int | None) -> bytes:
    # held while it is read, as another thread may put it out of those kept
    file = _open_files.get(ref.path) if ref.length >= 0 else OpenFile(ref.path)
    length = ref.length if ref.length >= 0 else os.fstat(file.descriptor).st_size
    if length > MAX_IMAGE_BYTES:
        raise BadImage("image too large", f"{ref.path} has {length} bytes")
    return read_at(file.descriptor, length if limit is None else min(length, limit), ref.offset)


def _read_url(ref: ImageRef) -> bytes:
    filesystem, path = filesystem_of(ref.path)
    end = None if ref.length < 0 else ref.offset + ref.length
    return bytes(filesystem.cat_file(path, start=ref.offset or None, end=end))


def open_regular(path: str) -> int:
    """A descriptor of a regular file; a pipe or device is refused (OSError) instead of waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # a NUL in the name
        raise FileNotFoundError(errno.ENOENT, str(error), path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file", path)
    return descriptor


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """`length` bytes from `offset`, fewer only where the file ends; the file's position is not touched."""
    data = os.pread(descriptor, length, offset)
    while len(data) < length and (more := os.pread(descriptor, length - len(data), offset + len(data))):
        data += more
    return data


class OpenFile:
    """A descriptor that is closed when nobody holds it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1  # stays so if the file cannot be opened
        self.descriptor = open_regular(path)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class Kept(Generic[K, T]):
    """What was opened last, at most `limit`; safe for threads, and a forked child opens its own.

    One that a thread is reading stays open until it is done.
    """

    def __init__(self, opened: Callable[[K], T], limit: int) -> None:
        self.opened, self.limit = opened, limit
        self._start()

    def _start(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._files: OrderedDict[K, T] = OrderedDict()

    def get(self, path: K) -> T:
        """What `path` opens."""
        if self._pid != os.getpid():  # another thread of the parent may have held the lock
            self._start()
        with self._lock:
            file = self._files.pop(path) if path in self._files else self.opened(path)
            self._files[path] = file
            if len(self._files) > self.limit:
                self._files.popitem(last=False)
        return file


class KeptByThread(Kept[K, T], threading.local):
    """Likewise, but each thread opens its own."""


class ParquetCells:
    """Cells of a Parquet file; the last row groups read are kept decoded."""

    def __init__(self, path: str) -> None:
        self.file = open_parquet(path)
        sizes = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.starts = list(itertools.accumulate(sizes, initial=0))
        self.num_rows = self.starts[-1]
        self._groups: Kept[tuple[int, str], Any] = Kept(self._read_group, MAX_ROW_GROUPS)

    def _read_group(self, key: tuple[int, str]) -> Any:
        group, column = key
        return self.file.read_row_group(group, columns=[column], use_threads=False).column(column)

    def cell(self, row: int, column: str) -> Any:
        """The value at `row` of `column`."""
        group = bisect.bisect_right(self.starts, row) - 1
        return self._groups.get((group, column))[row - self.starts[group]].as_py()


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


def open_cells(path: str) -> ParquetCells | pa.Table:
    """A table whose cells can be read one by one; of an Arrow file none is before it is asked for."""
    return ParquetCells(path) if suffix(path) == ".parquet" else open_arrow(path)


_open_files = Kept(OpenFile, MAX_OPEN_FILES)
_open_tables = KeptByThread(open_cells, MAX_OPEN_TABLES)


_open_zips: Kept[str, zipfile.ZipFile] = Kept(zipfile.ZipFile, MAX_OPEN_TABLES)


def _decoded(ref: ImageRef) -> bytes:
    """The image that stands as base64 in a byte range."""
    text = read_bytes(ImageRef(ref.path, ref.offset, ref.length))
    try:
        return base64.b64decode(text, altchars=b"-_" if b"-" in text or b"_" in text else None, validate=True)
    except ValueError as error:
        raise BadImage("not an image", f"{ref.path} at {ref.offset} holds no base64: {error}") from None


def _read_member(ref: ImageRef) -> bytes:
    """A member of a zip; several threads may read one."""
    try:
        archive = _open_zips.get(ref.path)
        if archive.getinfo(ref.column).file_size > MAX_IMAGE_BYTES:
            raise BadImage("image too large", f"{ref.path}: {ref.column}")
        return archive.read(ref.column)
    except FileNotFoundError:
        raise BadImage("missing file", ref.path) from None
    except KeyError:
        raise BadImage("missing file", f"{ref.path} holds no {ref.column}") from None
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, NotImplementedError) as error:
        raise BadImage("unreadable file", f"{ref.path}: {ref.column}: {error}") from None


def _read_cell(ref: ImageRef) -> bytes:
    if not is_url(ref.path) and not Path(ref.path).is_file():
        raise BadImage("missing file", ref.path)
    try:
        table = _open_tables.get(ref.path)
        if ref.offset >= table.num_rows:
            raise BadImage("truncated file", f"{ref.path} has {table.num_rows} rows, row {ref.offset} is asked for")
        if isinstance(table, ParquetCells):
            value = table.cell(ref.offset, ref.column)
        else:
            value = table.column(ref.column)[ref.offset].as_py()
    except TABLE_ERRORS as error:
        raise BadImage("unreadable file", f"{ref.path}: {error}") from None
    return cell_bytes(value, where=f"{ref.path} row {ref.offset}, column {ref.column}")


def cell_bytes(value: Any, *, where: str) -> bytes:
    """The image's bytes in a cell: a binary one, or the `bytes` of a `datasets` Image; BadImage if it has none."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise BadImage("no image", f"{where} holds {type(data).__name__}, no bytes")
    if not data:
        raise BadImage("empty image", f"{where} has 0 bytes")
    if len(data) > MAX_IMAGE_BYTES:
        raise BadImage("image too large", f"{where}: {len(data)} bytes")
    return data
