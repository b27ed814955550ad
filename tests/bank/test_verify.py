"""`bank verify` finds what is wrong, and says nothing is where nothing is."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from llm2clip.artifacts import file_digest, read_json, write_json
from llm2clip.bank.config import BankVerifyConfig
from llm2clip.bank.reader import Bank
from llm2clip.bank.verify import check_table, verify_bank
from llm2clip.errors import ArtifactError, UsageError

FILES = """vectors/00003.npy vectors/00000.tokens.npy vectors/00003.json table/text.npy table/hash.npy table/facts.json
teacher.json""".split()


@pytest.fixture
def copy(bank: Bank, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bank.folder, tmp_path / "bank"))


def test_a_whole_bank(bank: Bank, capsys: pytest.CaptureFixture[str]) -> None:
    report = verify_bank(BankVerifyConfig(bank=bank.folder, device="cpu"))
    assert report["files"] == 15 + 16 and report["sample"] == 64
    assert report["min_cosine"] > 0.99999
    assert "31 files whole" in capsys.readouterr().out


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.01, 0.5, 0.999])
def test_a_flipped_bit_is_found(copy: Path, name: str, place: float) -> None:
    data = bytearray((copy / name).read_bytes())
    data[int(place * len(data))] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=str(Path(name).name)):
        verify_bank(BankVerifyConfig(bank=copy, teacher="none"))


def test_a_flipped_byte_is_mended_by_deleting_the_file(copy: Path, bank: Bank, captions_csv, build, files_of) -> None:
    path = copy / "vectors" / "00003.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ArtifactError, match="delete these files and type the command"):
        verify_bank(BankVerifyConfig(bank=copy, teacher="none"))
    path.unlink()
    build(captions_csv, copy)
    assert files_of(copy) == files_of(bank.folder)


def test_a_missing_file_is_found(copy: Path) -> None:
    (copy / "vectors" / "00001.npy").unlink()
    with pytest.raises(ArtifactError, match=r"vectors/00001\.npy"):
        verify_bank(BankVerifyConfig(bank=copy, teacher="none"))


def test_wrong_vectors_with_right_checksums_are_found(copy: Path) -> None:
    manifest = read_json(copy / "manifest.json")
    for shard in manifest["shards"]:
        entry = shard["files"]["vectors"]
        np.save(copy / entry["file"], -np.load(copy / entry["file"]))
        entry["sha256"] = file_digest(copy / entry["file"])
        write_json((copy / entry["file"]).with_suffix(".json"), shard)
    write_json(copy / "manifest.json", manifest)
    with pytest.raises(ArtifactError, match=r"has cosine -1\.0"):
        verify_bank(BankVerifyConfig(bank=copy, device="cpu"))


def test_another_teacher_is_refused_naming_both(bank: Bank, tiny_llm: Path, tmp_path: Path) -> None:
    from llm2clip.teacher.model import llm_as_encoder

    llm_as_encoder(tiny_llm, pooling="weighted").save_pretrained(str(tmp_path / "other"), create_model_card=False)
    with pytest.raises(UsageError, match="another teacher") as error:
        verify_bank(BankVerifyConfig(bank=bank.folder, teacher=str(tmp_path / "other"), device="cpu"))
    assert bank.teacher_fingerprint in str(error.value)


@pytest.mark.parametrize(
    ("column", "change", "complaint"),
    [
        ("caption_row", lambda a: np.where(a == 5, 500, a), "row does not exist"),
        ("caption_kind", lambda a: a + 1, "kind does not exist"),
        ("caption_start", lambda a: a[::-1].copy(), "caption_start does not"),
    ],
)
def test_a_broken_table_is_found(copy: Path, column: str, change, complaint: str) -> None:
    path = copy / "table" / f"{column}.npy"
    np.save(path, change(np.load(path)).astype(np.load(path).dtype))
    with pytest.raises(ArtifactError, match=complaint):
        check_table(Bank.open(copy).table)
