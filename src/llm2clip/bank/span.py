"""Many .npy files as one array: their pages are mapped side by side, so that a gather is one call of numpy's.

numpy maps a file wherever the system likes, and a gather over several maps copies twice. Here a range of addresses is
reserved for all files of a bank, and each file is mapped to its slot in it when it is first read. Slots are a multiple
of both page and row length apart, so one stride reaches every row; what lies between two files is never read.
"""

from __future__ import annotations

import ctypes
import functools
import io
import math
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llm2clip.errors import ArtifactError, LLM2CLIPError

HEADER_BYTES = 128
"""Length of the header of every file of a bank's shards (numpy pads it to a multiple of 64)."""
LARGE_PAGE = 1 << 21
MAX_STEP = 1 << 26
"""Addresses given up for alignment: 64 MiB a file, of the 128 TiB a process has."""
MAP_FIXED = 0x10
MAP_FAILED = ctypes.c_void_p(-1).value


class Span:
    """Rows `[sum of lengths, *row_shape]` that lie in several .npy files.

    Args:
        files: in the order of their rows.
        lengths: rows of each.

    Raises:
        LLM2CLIPError: on Windows.
    """

    def __init__(
        self, files: Sequence[Path], lengths: Sequence[int], *, dtype: DTypeLike, row_shape: tuple[int, ...]
    ) -> None:
        if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
            raise LLM2CLIPError(f"a bank cannot be read on {sys.platform}; use Linux or macOS (on Windows, its WSL)")
        self.files, self.lengths, self.dtype, self.row_shape = list(files), list(lengths), np.dtype(dtype), row_shape
        row_bytes = self.dtype.itemsize * math.prod(row_shape)
        step, alignment = slot_step(row_bytes)
        slots = [-(-(HEADER_BYTES + length * row_bytes) // step) * step for length in lengths]
        self._slot_start = np.cumsum([0, *slots])
        self._start = np.cumsum([0, *lengths], dtype=np.int64)
        self._shift = self._slot_start[:-1] // row_bytes - self._start[:-1]  # from a row to its place in the array
        self._is_mapped = np.zeros(len(files), bool)
        size = int(self._slot_start[-1]) + step
        reserved = _mmap(None, size + alignment, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self._close = weakref.finalize(self, _libc().munmap, reserved, size + alignment)
        self._address = -(-reserved // alignment) * alignment
        self._exceeds_memory = 2 * sum(lengths) * row_bytes > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory: Any = (ctypes.c_char * size).from_address(self._address)
        num_rows = (size - HEADER_BYTES) // row_bytes
        flat = np.frombuffer(memory, self.dtype, num_rows * math.prod(row_shape), offset=HEADER_BYTES)
        self._rows = flat.reshape(num_rows, *row_shape)

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """A copy of the given rows `[n, *row_shape]`; they must be in range.

        Raises:
            ArtifactError: if a file is missing or damaged.
        """
        files = np.searchsorted(self._start, rows, side="right") - 1
        if not self._is_mapped.all():
            for number in np.unique(files[~self._is_mapped[files]]):
                self._map(int(number))
        return np.take(self._rows, rows + self._shift[files], axis=0)

    def _map(self, number: int) -> None:
        path, length = self.files[number], self.lengths[number]
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing; type the command that made its bank again") from None
        try:
            self._check(file, path, (length, *self.row_shape))
            size = os.fstat(file).st_size
            address = _mmap(self._address + int(self._slot_start[number]), size, mmap.MAP_SHARED | MAP_FIXED, file)
        finally:
            os.close(file)
        if self._exceeds_memory:  # most rows come from the disk: do not read 128 KB ahead for each
            _libc().madvise(address, size, mmap.MADV_RANDOM)
        self._is_mapped[number] = True

    def _check(self, file: int, path: Path, shape: tuple[int, ...]) -> None:
        """Check that the file is what the manifest says; a shorter one would kill the process when it is read."""
        expected = HEADER_BYTES + self.dtype.itemsize * math.prod(shape)
        size = os.fstat(file).st_size
        found: Any
        try:
            head = io.BytesIO(os.pread(file, HEADER_BYTES, 0))
            np.lib.format.read_magic(head)
            found_shape, fortran, found_dtype = np.lib.format.read_array_header_1_0(head)
            found = f"{found_dtype} {found_shape} in {size:,} bytes"
            fits = (found_shape, fortran, found_dtype, size) == (shape, False, self.dtype, expected)
        except ValueError:
            found, fits = f"{size} bytes", False
        if not fits:
            raise ArtifactError(
                f"{path} is damaged: it holds {found}, expected {self.dtype} {shape} in {expected:,}; delete it and "
                "type the command that made its bank again"
            )


def slot_step(row_bytes: int) -> tuple[int, int]:
    """What slots are a multiple of, and how their addresses are aligned: to large pages where rows fit them.

    >>> slot_step(8192), slot_step(8198)
    ((2097152, 2097152), (16789504, 4096))
    """
    step = math.lcm(LARGE_PAGE, row_bytes)
    if step <= MAX_STEP:
        return step, LARGE_PAGE
    return math.lcm(mmap.ALLOCATIONGRANULARITY, row_bytes), mmap.ALLOCATIONGRANULARITY


@functools.cache
def _libc() -> Any:
    """The C library; not loaded on import, as Windows has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _mmap(address: int | None, size: int, flags: int, file: int) -> int:
    found = _libc().mmap(address, size, mmap.PROT_READ, flags, file, 0)
    if found == MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot map {size} bytes of a bank: {os.strerror(code)}")
    return int(found)
