"""Arrays that grow and files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from llm2clip.bank import files
from llm2clip.errors import LLM2CLIPError


def test_a_growing_array_is_a_plain_npy_file(tmp_path: Path) -> None:
    array = files.GrowingArray(tmp_path / "a.npy", np.int32)
    array.append([1, 2])
    array.append(np.array([3], np.int64))
    array.close()
    assert np.load(tmp_path / "a.npy").tolist() == [1, 2, 3]
    np.save(tmp_path / "b.npy", np.array([1, 2, 3], np.int32))
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_rows_of_a_growing_array_may_be_arrays(tmp_path: Path) -> None:
    array = files.GrowingArray(tmp_path / "a.npy", np.uint8, row_shape=(2,))
    array.append(np.array([[1, 2], [3, 4]], np.uint8))
    array.close()
    assert np.load(tmp_path / "a.npy").tolist() == [[1, 2], [3, 4]]


def test_a_growing_array_may_stay_empty(tmp_path: Path) -> None:
    array = files.GrowingArray(tmp_path / "a.npy", np.int64)
    array.append([])
    array.close()
    assert np.load(tmp_path / "a.npy").shape == (0,)


def test_texts_are_a_blob_and_starts(tmp_path: Path) -> None:
    texts = files.GrowingTexts(tmp_path, "text")
    texts.append([b"a disc", "圆".encode()])
    texts.append([])
    texts.append([b""])
    assert texts.length == 3
    for array in texts.arrays:
        array.close()
    assert np.load(tmp_path / "text.npy").tobytes() == "a disc圆".encode()
    assert np.load(tmp_path / "text_start.npy").tolist() == [0, 6, 9, 9]


def test_write_array_returns_the_checksum_of_the_file(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    digest = files.write_array(tmp_path / "a.npy", array)
    assert digest == hashlib.sha256((tmp_path / "a.npy").read_bytes()).hexdigest()
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_line_and_leaves_nothing(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(code, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(LLM2CLIPError, match=r"no space left .* type the same command"),
        files.one_line_disk_errors(tmp_path),
    ):
        files.write_array(tmp_path / "a.npy", np.zeros(3))
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_disk_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.one_line_disk_errors(tmp_path):
        files.write_array(tmp_path / "absent" / "a.npy", np.zeros(3))


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, renames: dict[str, list[str]]) -> None:
    files.write_array(tmp_path / "a.npy", np.zeros(3))
    files.write_facts(tmp_path / "b.json", {})
    (tmp_path / "folder").mkdir()
    texts = files.GrowingTexts(tmp_path / "folder", "text")
    texts.append([b"a"])
    for array in texts.arrays:
        array.close()
    os.replace(tmp_path / "folder", tmp_path / "table")
    assert renames == {"a.npy": [], "b.json": [], "table": []}


def test_starts_are_whole_numbers_and_facts_are_the_json_they_were(tmp_path: Path) -> None:
    texts = files.GrowingTexts(tmp_path, "text")
    texts.append([b"abc"])
    for array in texts.arrays:
        array.close()
    assert np.load(tmp_path / "text_start.npy").dtype == np.int64
    files.write_facts(tmp_path / "facts.json", {"rows": 3, "name": "圆"})
    assert json.loads((tmp_path / "facts.json").read_text(encoding="utf-8")) == {"rows": 3, "name": "圆"}
