"""Files mapped side by side read like their concatenation."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from llm2clip.bank.files import write_array
from llm2clip.bank.span import Span
from llm2clip.errors import ArtifactError


def write(folder: Path, lengths: list[int], dtype: str, row_shape: tuple[int, ...]) -> tuple[Span, np.ndarray]:
    draw = np.random.default_rng(0)
    parts = [draw.integers(0, 100, (length, *row_shape)).astype(dtype) for length in lengths]
    files = [folder / f"{i}.npy" for i in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        write_array(file, part)
    return Span(files, lengths, dtype=dtype, row_shape=row_shape), np.concatenate(parts)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "uint16"])
@pytest.mark.parametrize("row_shape", [(), (1,), (3,), (384,), (2048,), (5, 7)])
def test_rows_in_any_order(dtype: str, row_shape: tuple[int, ...], tmp_path: Path) -> None:
    span, whole = write(tmp_path, [700, 1, 64, 700, 13], dtype, row_shape)
    rows = np.random.default_rng(1).integers(0, len(whole), 3000)
    np.testing.assert_array_equal(span.take(rows), whole[rows])
    np.testing.assert_array_equal(span.take(np.arange(len(whole))), whole)


def test_files_are_mapped_when_they_are_read(tmp_path: Path) -> None:
    span, whole = write(tmp_path, [4, 4, 4], "float32", (8,))
    np.testing.assert_array_equal(span.take(np.array([9])), whole[[9]])
    assert span._is_mapped.tolist() == [False, False, True]
    (tmp_path / "0.npy").unlink()
    with pytest.raises(ArtifactError, match=r"0\.npy is missing"):
        span.take(np.array([0]))


@pytest.mark.parametrize("data", [b"", b"short", b"\x93NUMPY" + b"\x00" * 200])
def test_a_damaged_file_is_refused_before_it_is_read(data: bytes, tmp_path: Path) -> None:
    span, _ = write(tmp_path, [4], "float32", (8,))
    (tmp_path / "0.npy").write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        span.take(np.array([0]))


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    span, _ = write(tmp_path, [4], "float32", (8,))
    path = tmp_path / "0.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="damaged"):
        span.take(np.array([0]))


def test_memory_is_given_back(tmp_path: Path) -> None:
    span, whole = write(tmp_path, [4], "float32", (8,))
    taken = span.take(np.array([1, 2]))
    close = span._close
    del span
    gc.collect()
    assert not close.alive
    np.testing.assert_array_equal(taken, whole[1:3])
