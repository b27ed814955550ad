"""Writing a bank's arrays: .npy files that grow, texts as one blob, files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llm2clip.artifacts import indented_json
from llm2clip.errors import LLM2CLIPError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def one_line_disk_errors(path: Path) -> Iterator[None]:
    """Say in one line that the disk is full, and that nothing is lost.

    Raises:
        LLM2CLIPError: instead of the system's error for a full disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise LLM2CLIPError(
            f"no space left on the disk of {path}: free some and type the same command, it goes on where it stopped"
        ) from None


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def header(dtype: DTypeLike, shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file (version 1.0)."""
    buffer = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.getvalue()


def write_array(path: Path, array: NDArray[Any]) -> str:
    """Write `array` as `path` (.npy) and return the file's SHA-256; the file appears whole or not at all."""
    array = np.ascontiguousarray(array)
    return write_file(path, header(array.dtype, array.shape), array.reshape(-1).view(np.uint8).data)


def write_facts(path: Path, value: Any) -> None:
    """Write JSON, as several processes may do at once; the file appears whole or not at all."""
    write_file(path, indented_json(value))


def write_file(path: Path, *parts: bytes | memoryview) -> str:
    """Write `parts` one after another and return the file's SHA-256; the file appears whole or not at all."""
    digest = hashlib.sha256()
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            for part in parts:
                digest.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest()


class GrowingArray:
    """A .npy file that rows are appended to; the header gets its final length on closing.

    Args:
        row_shape: shape of one row, `()` for plain numbers.
    """

    def __init__(self, path: Path, dtype: DTypeLike, *, row_shape: tuple[int, ...] = ()) -> None:
        self.path, self.dtype, self.row_shape = path, np.dtype(dtype), row_shape
        self.length = 0
        self._file = path.open("wb")
        self._header = self._file.write(header(self.dtype, (0, *row_shape)))

    def append(self, rows: NDArray[Any] | list[Any] | bytes) -> None:
        """Append rows `[n, *row_shape]`."""
        array = np.frombuffer(rows, np.uint8) if isinstance(rows, bytes) else np.asarray(rows)
        array = np.ascontiguousarray(array.reshape(-1, *self.row_shape), self.dtype)
        self._file.write(array.reshape(-1).view(np.uint8).data)
        self.length += len(array)

    def abandon(self) -> None:
        """Close the file as it is, unless it is closed; what a full disk has no room for is given up."""
        with contextlib.suppress(OSError):
            self._file.close()

    def close(self) -> None:
        """Set the length in the header and bring everything to the disk."""
        final = header(self.dtype, (self.length, *self.row_shape))
        assert len(final) == self._header, "numpy leaves room in the header for the length to grow"
        self._file.seek(0)
        self._file.write(final)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class GrowingTexts:
    """Texts as one blob of bytes (`NAME.npy`, uint8) and where each begins (`NAME_start.npy`, int64 `[N + 1]`)."""

    def __init__(self, folder: Path, name: str) -> None:
        self._blob = GrowingArray(folder / f"{name}.npy", np.uint8)
        self._start = GrowingArray(folder / f"{name}_start.npy", np.int64)
        self.arrays = (self._blob, self._start)
        self._start.append([0])

    @property
    def length(self) -> int:
        """Texts so far."""
        return self._start.length - 1

    def append(self, texts: list[bytes]) -> None:
        """Append encoded texts."""
        ends = self._blob.length + np.cumsum([len(text) for text in texts], dtype=np.int64)
        self._blob.append(b"".join(texts))
        self._start.append(ends)
