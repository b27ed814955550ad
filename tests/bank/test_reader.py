"""Reading a bank: by hand with pyarrow and numpy alone, in any order, from other processes."""

from __future__ import annotations

import pickle
import re
import shutil
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from llm2clip.artifacts import write_json
from llm2clip.bank.dtypes import DTYPES
from llm2clip.bank.reader import Bank
from llm2clip.bank.verify import cosines
from llm2clip.errors import ArtifactError, UsageError

from ..forking import end_of, fork


def test_counts(bank: Bank) -> None:
    assert (bank.num_samples, bank.num_rows, bank.layout.num_shards, bank.dim) == (60, 120, 8, 32)
    assert bank.kinds == ["short", "long"]
    assert bank.rows(3).tolist() == [6, 7]
    assert bank.rows(3, "long").tolist() == [7]
    assert bank.image(3).path.endswith("3.jpg")
    assert bank.sample(3).captions["long"] == (bank.text(7),)
    assert bank.sample_id(3) == "3.jpg"


def test_vectors_in_any_order(bank: Bank) -> None:
    everything = np.load(bank.folder / "vectors" / "vectors.npy")
    assert everything.shape == (120, 32) and everything.dtype == np.float16
    rows = np.random.default_rng(0).integers(0, 120, 500)
    np.testing.assert_array_equal(bank.vectors(rows), everything[rows])
    np.testing.assert_array_equal(bank.vectors([119]), everything[119:])
    np.testing.assert_array_equal(bank.vectors(range(16)), everything[:16])
    assert bank.vectors([]).shape == (0, 32)


def test_vectors_may_be_changed(bank: Bank) -> None:
    vectors = bank.vectors([0])
    vectors[:] = 0
    assert bank.vectors([0]).any()


@pytest.mark.parametrize("row", [-1, 120])
def test_a_row_that_is_not_there(bank: Bank, row: int) -> None:
    with pytest.raises(IndexError, match="the bank has 120"):
        bank.vectors([0, row])


def test_a_kind_that_is_not_there(bank: Bank) -> None:
    with pytest.raises(UsageError, match=r"'shrt' is unknown .*'short'"):
        bank.rows(0, "shrt")


def test_the_program_in_the_docs_reads_a_bank(bank: Bank, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "bank-format.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    (tmp_path / "bank").symlink_to(bank.folder)
    program += "\nimport sys; assert 'torch' not in sys.modules\nprint(row, vector.tolist())"
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    (row,) = bank.rows(5, "long")
    assert printed == f"{bank.text(row)}\n{row} {bank.vectors([row])[0].tolist()}\n"


def test_a_bank_travels_to_other_processes(bank: Bank) -> None:
    copy = pickle.loads(pickle.dumps(bank))
    np.testing.assert_array_equal(copy.vectors([3, 99]), bank.vectors([3, 99]))
    assert copy.sample(7) == bank.sample(7)
    for method in ("fork", "spawn"):
        with get_context(method).Pool(2) as pool:
            parts = pool.map(bank.vectors, [[3, 99], [5]])
            samples = pool.map(bank.sample, [3, 59])
        np.testing.assert_array_equal(parts[0], bank.vectors([3, 99]))
        assert samples == [bank.sample(3), bank.sample(59)]


def test_a_bank_of_any_tables_is_read_in_a_forked_child_as_it_is(bank: Bank) -> None:
    """A loader's process has the parent's open bank, without opening it again."""
    child = fork(lambda: check_reads(bank))
    assert end_of(child) == 0


def check_reads(bank: Bank) -> None:
    assert bank.vectors([3, 99]).any() and bank.text(7) and bank.image(3).path.endswith("3.jpg")


def test_reading_needs_no_torch(bank: Bank) -> None:
    program = (
        "import sys; from llm2clip.bank.reader import Bank; Bank.open(sys.argv[1]).vectors([0]); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(bank.folder)], check=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_close_to_the_truth(dtype: str, bank: Bank, captions_csv: Path, build, tmp_path: Path) -> None:
    exact = build(captions_csv, tmp_path / "exact", dtype="float32")
    other = build(captions_csv, tmp_path / dtype, dtype=dtype)
    rows = np.arange(120)[::-1]
    vectors = other.vectors(rows)
    assert vectors.dtype == (np.float16 if dtype == "float16" else np.float32)
    assert cosines(vectors.astype(np.float32), exact.vectors(rows)).min() > 0.9995


def test_damaged_vectors_are_one_line(bank: Bank, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bank.folder, tmp_path / "bank"))
    path = copy / "vectors" / "vectors.npy"
    path.write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match=r"vectors\.npy is damaged: it holds 8 bytes, expected float16 \(120, 32\)"):
        Bank.open(copy)
    np.save(path, np.zeros((2, 3)))
    with pytest.raises(ArtifactError, match=r"it holds float64 \(2, 3\) in 176 bytes, expected float16"):
        Bank.open(copy)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"vectors\.npy is missing"):
        Bank.open(copy)


@pytest.mark.parametrize("name", ["samples", "texts"])
def test_a_damaged_table_is_one_line(name: str, bank: Bank, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bank.folder, tmp_path / "bank"))
    path, other = (copy / "table" / f"{each}.arrow" for each in (name, "texts" if name == "samples" else "samples"))
    data = path.read_bytes()
    for wrong in (b"", b"nonsense", data[: len(data) // 2], data[:-1], other.read_bytes()):
        path.write_bytes(wrong)
        with pytest.raises(ArtifactError, match=rf"{name}\.arrow is damaged \(.+\); delete it"):
            Bank.open(copy)
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{name}\.arrow is missing"):
        Bank.open(copy)


def test_a_bank_of_an_older_format_is_one_line(bank: Bank, tmp_path: Path, captions_csv: Path, build) -> None:
    copy = Path(shutil.copytree(bank.folder, tmp_path / "bank"))
    write_json(copy / "manifest.json", {**bank.manifest, "format_version": 1})
    message = r"this bank was made by an older version \(format 1, now 2\): build it again in a new folder"
    with pytest.raises(ArtifactError, match=message):
        Bank.open(copy)
    with pytest.raises(ArtifactError, match=message):
        build(captions_csv, copy)


def test_what_is_no_bank(tmp_path: Path, bank: Bank) -> None:
    with pytest.raises(UsageError, match="no folder"):
        Bank.open(tmp_path / "absent")
    with pytest.raises(UsageError, match="no bank"):
        Bank.open(tmp_path)
