"""Reading a bank: by hand with numpy alone, in any order, from other processes."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from llm2clip.bank.dtypes import DTYPES
from llm2clip.bank.reader import Bank
from llm2clip.bank.verify import cosines
from llm2clip.errors import ArtifactError, UsageError


def test_counts(bank: Bank) -> None:
    assert (bank.num_samples, bank.num_rows, bank.num_shards, bank.dim) == (60, 120, 8, 32)
    assert bank.kinds == ["short", "long"]
    assert bank.rows(3).tolist() == [6, 7]
    assert bank.rows(3, "long").tolist() == [7]
    assert bank.picture(3).path.endswith("3.jpg")
    assert bank.sample(3).captions["long"] == (bank.text(7),)
    assert bank.sample_id(3) == "3.jpg"


def test_vectors_in_any_order(bank: Bank) -> None:
    everything = np.concatenate([np.load(path) for path in sorted(bank.folder.glob("vectors/[0-9]*[0-9].npy"))])
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
    with get_context("fork").Pool(2) as pool:
        parts = pool.map(bank.vectors, [[3, 99], [5]])
    np.testing.assert_array_equal(parts[0], bank.vectors([3, 99]))


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


def test_a_damaged_shard_is_one_line(captions_csv: Path, build, tmp_path: Path) -> None:
    bank = build(captions_csv, tmp_path / "bank")
    (bank.folder / "vectors" / "00002.npy").write_bytes(b"nonsense")
    (bank.folder / "vectors" / "00003.npy").unlink()
    np.save(bank.folder / "vectors" / "00004.npy", np.zeros((2, 3)))
    for row, complaint in ((32, "is damaged: it holds 8 bytes"), (48, "is missing"), (64, "expected float16")):
        with pytest.raises(ArtifactError, match=complaint):
            bank.vectors([row])


def test_what_is_no_bank(tmp_path: Path, bank: Bank) -> None:
    with pytest.raises(UsageError, match="no folder"):
        Bank.open(tmp_path / "absent")
    with pytest.raises(UsageError, match="no bank"):
        Bank.open(tmp_path)
