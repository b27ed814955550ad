"""Bytes of one picture from where it lies: a file, a range of a file, a table cell, or the same behind a URL.

Open files are kept by process, so that a loader's workers read a member of a tar with one system call.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import threading
from collections import OrderedDict
from typing import Any

from llm2clip.captions.bad import BadPicture
from llm2clip.captions.sample import PictureRef
from llm2clip.errors import SourceError

MAX_OPEN_FILES = 64
"""Files (tar shards) kept open in each process."""
MAX_PICTURE_BYTES = 1 << 29
"""Longer encoded pictures (512 MiB) are refused before they are read."""


def is_url(path: str) -> bool:
    """Whether `path` is for fsspec (`https://...`, `hf://...`, `simplecache::s3://...`), not a local file.

    >>> is_url("hf://datasets/org/name/00000.tar"), is_url("/data/00000.tar")
    (True, False)
    """
    return "://" in path


def read_bytes(ref: PictureRef) -> bytes:
    """The encoded bytes of a picture.

    Raises:
        BadPicture: if it is missing, cut off or no file; the cause says which.
    """
    if ref.column:
        return _read_cell(ref)
    if ref.length == 0:
        raise BadPicture("empty picture", f"{ref.path} has 0 bytes" + (f" at {ref.offset}" if ref.offset else ""))
    if ref.length > MAX_PICTURE_BYTES:
        raise BadPicture("picture too large", f"{ref.path} at {ref.offset}: {ref.length} bytes")
    data = _read_url(ref) if is_url(ref.path) else _read_local(ref)
    if 0 <= ref.length < len(data):
        raise BadPicture("unreadable file", f"{ref.path}: the server gives whole files only; fetch it to a local disk")
    if len(data) < ref.length:
        raise BadPicture(
            "truncated file", f"{ref.path} ends {ref.length - len(data)} bytes before the picture at {ref.offset} does"
        )
    if not data:
        raise BadPicture("empty picture", f"{ref.path} has 0 bytes")
    return data


class OpenFile:
    """A descriptor that is closed when nobody holds it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1  # stays so if the file cannot be opened
        self.descriptor = open_regular(path)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class OpenFiles:
    """The files read last, kept open; safe for threads, and a forked child opens its own.

    Args:
        limit: files kept; one that a thread is reading stays open until it is done.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._start()

    def _start(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._files: OrderedDict[str, OpenFile] = OrderedDict()

    def get(self, path: str) -> OpenFile:
        """`path`, open for reading.

        Raises:
            OSError: if it cannot be opened or is no regular file.
        """
        if self._pid != os.getpid():  # another thread of the parent may have held the lock
            self._start()
        with self._lock:
            file = self._files.pop(path, None) or OpenFile(path)
            self._files[path] = file
            if len(self._files) > self.limit:
                self._files.popitem(last=False)
        return file


def open_regular(path: str) -> int:
    """A descriptor of a regular file; a pipe or device is refused instead of waited for.

    Raises:
        OSError: if it cannot be opened or is something else.
    """
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
    if len(data) in (0, length):
        return data
    parts = [data]
    while data and length > (done := sum(map(len, parts))):
        data = os.pread(descriptor, length - done, offset + done)
        parts.append(data)
    return b"".join(parts)


_open_files = OpenFiles(MAX_OPEN_FILES)


def _read_local(ref: PictureRef) -> bytes:
    try:
        if ref.length >= 0:
            file = _open_files.get(ref.path)
            return read_at(file.descriptor, ref.length, ref.offset)
        descriptor = open_regular(ref.path)
        try:
            length = os.fstat(descriptor).st_size
            if length > MAX_PICTURE_BYTES:
                raise BadPicture("picture too large", f"{ref.path} has {length} bytes")
            return read_at(descriptor, length, ref.offset)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise BadPicture("missing file", ref.path) from None
    except OSError as error:
        raise BadPicture("unreadable file", f"{ref.path}: {error.strerror or error}") from None


def _read_url(ref: PictureRef) -> bytes:
    try:
        filesystem, path = filesystem_of(ref.path)
        end = None if ref.length < 0 else ref.offset + ref.length
        return bytes(filesystem.cat_file(path, start=ref.offset or None, end=end))
    except FileNotFoundError:
        raise BadPicture("missing file", ref.path) from None
    except url_errors() as error:
        raise BadPicture("unreadable file", f"{ref.path}: {error}") from None


@functools.lru_cache
def url_errors() -> tuple[type[Exception], ...]:
    """What a file behind a URL raises: the usual ones, and those of the HTTP, Hub and S3 clients that are installed."""
    errors: list[type[Exception]] = [OSError, ValueError]
    with contextlib.suppress(ImportError):
        from aiohttp import ClientError

        errors.append(ClientError)
    with contextlib.suppress(ImportError):
        from huggingface_hub.errors import HfHubHTTPError

        # its base is that of the HTTP client's errors, httpx or another as versions go
        errors += [base for base in HfHubHTTPError.__mro__[1:] if issubclass(base, Exception) and base is not Exception]
    with contextlib.suppress(ImportError):
        from botocore.exceptions import BotoCoreError

        errors.append(BotoCoreError)
    return tuple(errors)


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec file system for a URL, and the path in it.

    Raises:
        SourceError: if the protocol's package is not installed.
        ValueError: if fsspec does not know the protocol.
    """
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise SourceError(f"{url} needs another package ({error}); type: pip install 'llm2clip[remote]'") from None
    return filesystem, str(path)


def _read_cell(ref: PictureRef) -> bytes:
    from llm2clip.captions.cells import read_cell

    return read_cell(ref)
