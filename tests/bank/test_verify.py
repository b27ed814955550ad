"""`bank verify` finds what is wrong, and says nothing is where nothing is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from llm2clip.artifacts import file_digest, read_json, write_json
from llm2clip.bank.config import BankVerifyConfig
from llm2clip.bank.encoder import CaptionEncoder
from llm2clip.bank.reader import Bank
from llm2clip.bank.vectors import checksum
from llm2clip.bank.verify import check_table, cosines, verify_bank
from llm2clip.errors import ArtifactError, UsageError

FILES = "vectors/vectors.npy vectors/tokens.npy vectors/00003.json table/samples.arrow table/texts.arrow".split()
FILES += ["table/facts.json", "teacher.json"]


@pytest.fixture
def copy(bank: Bank, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bank.folder, tmp_path / "bank"))


def test_a_whole_bank(bank: Bank, capsys: pytest.CaptureFixture[str]) -> None:
    report = verify_bank(BankVerifyConfig(bank=bank.folder, device="cpu"))
    assert (report["files"], report["shards"], report["sample"]) == (5, 8, 64)
    assert report["min_cosine"] > 0.99999
    assert "5 files and 8 shards whole" in capsys.readouterr().out


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.01, 0.5, 0.999])
def test_a_flipped_bit_is_found(copy: Path, name: str, place: float) -> None:
    data = bytearray((copy / name).read_bytes())
    data[int(place * len(data))] ^= 1
    (copy / name).write_bytes(data)
    shard = r"|vectors/0000\d\.json" if name.endswith(".npy") else ""
    with pytest.raises(ArtifactError, match=re.escape(Path(name).name) + shard):
        verify_bank(BankVerifyConfig(bank=copy, teacher="none"))


def flip_rows(folder: Path, name: str, first: int, last: int) -> None:
    """Turn the signs of some rows of an array."""
    array = np.load(folder / "vectors" / f"{name}.npy", mmap_mode="r+")
    array[first:last] = -array[first:last]
    array.flush()


def test_a_flipped_byte_is_mended_by_deleting_what_is_named(
    copy: Path, bank: Bank, captions_csv, build, files_of, encoded
) -> None:
    flip_rows(copy, "vectors", 48, 49)
    with pytest.raises(ArtifactError, match=r"damaged: vectors/00003\.json; delete these files and type the command"):
        verify_bank(BankVerifyConfig(bank=copy, teacher="none"))
    (copy / "vectors" / "00003.json").unlink()
    encoded.clear()
    build(captions_csv, copy)
    assert encoded == [16]
    assert files_of(copy) == files_of(bank.folder)


def test_a_missing_file_is_found(copy: Path) -> None:
    (copy / "vectors" / "00001.json").unlink()
    with pytest.raises(ArtifactError, match=r"vectors/00001\.json"):
        verify_bank(BankVerifyConfig(bank=copy, teacher="none"))
    (copy / "vectors" / "vectors.npy").unlink()
    with pytest.raises(ArtifactError, match=r"vectors/vectors\.npy is missing"):
        verify_bank(BankVerifyConfig(bank=copy, teacher="none"))


def test_wrong_vectors_with_right_checksums_are_found(copy: Path) -> None:
    flip_rows(copy, "vectors", 0, 120)
    seal_shards(copy)
    with pytest.raises(ArtifactError, match=r"has cosine -1\.0"):
        verify_bank(BankVerifyConfig(bank=copy, device="cpu"))


def test_another_teacher_is_refused_naming_both(bank: Bank, tiny_llm: Path, tmp_path: Path) -> None:
    from llm2clip.teacher.model import llm_as_encoder

    llm_as_encoder(tiny_llm, pooling="weighted").save_pretrained(str(tmp_path / "other"), create_model_card=False)
    with pytest.raises(UsageError, match="another teacher") as error:
        verify_bank(BankVerifyConfig(bank=bank.folder, teacher=str(tmp_path / "other"), device="cpu"))
    assert bank.teacher_fingerprint in str(error.value)


def ends_early(starts: np.ndarray) -> np.ndarray:
    return np.minimum(starts, starts[-1] - 1)


def falls(starts: np.ndarray) -> np.ndarray:
    return np.concatenate([starts[:3], starts[1:2], starts[4:]])


@pytest.mark.parametrize(
    ("column", "change", "complaint"),
    [
        ("caption_row", lambda a: np.where(a == 5, 500, a), "a caption's row does not exist"),
        ("caption_row", lambda a: np.where(a == 5, 120, a), "a caption's row does not exist"),
        ("caption_row", lambda a: np.where(a == 5, -1, a), "a caption's row does not exist"),
        ("caption_kind", lambda a: a + 1, "a caption's kind does not exist"),
        ("caption_start", falls, "caption_start does not rise"),
        ("caption_start", ends_early, "caption_start does not end with the captions"),
    ],
)
def test_a_broken_table_with_right_checksums_is_found(copy: Path, column: str, change, complaint: str) -> None:
    path = change_in_place(copy, column, change)
    with pytest.raises(ArtifactError, match=f"{complaint}; delete its table folder"):
        check_table(Bank.open(copy))
    seal(copy, path)
    with pytest.raises(ArtifactError, match=complaint):
        verify_bank(BankVerifyConfig(bank=copy, teacher="none"))


def change_in_place(folder: Path, column: str, change) -> Path:
    """Change a column of the table, whose numbers are found by what they are."""
    array = getattr(Bank.open(folder), column)
    path = folder / "table" / "samples.arrow"
    data = path.read_bytes()
    assert data.count(array.tobytes()) == 1
    path.write_bytes(data.replace(array.tobytes(), change(array).astype(array.dtype).tobytes()))
    return path


def seal_shards(folder: Path) -> None:
    """Give changed vectors the checksums they have now, wherever one stands."""
    manifest, layout = read_json(folder / "manifest.json"), Bank.open(folder).layout
    for shard, facts in enumerate(manifest["shards"]):
        rows = layout.rows(shard)
        facts["sha256"]["vectors"] = checksum(layout.open("vectors")[rows.start : rows.stop])
        write_json(layout.facts_path(shard), facts)
    write_json(folder / "manifest.json", manifest)


def seal(folder: Path, path: Path) -> None:
    """Give a changed file the checksum it has now, wherever one stands."""
    manifest = read_json(folder / "manifest.json")
    manifest["table"][f"table/{path.name}"]["sha256"] = file_digest(path)
    write_json(folder / "manifest.json", manifest)


def test_samples_without_captions_are_no_fault(bank: Bank, copy: Path) -> None:
    change_in_place(copy, "caption_start", lambda starts: np.concatenate([starts[:1], starts[:1], starts[2:]]))
    check_table(Bank.open(copy))


def test_a_caption_that_is_another_with_right_checksums_is_found(copy: Path) -> None:
    path, text = copy / "table" / "texts.arrow", Bank.open(copy).text(0).encode()
    data = path.read_bytes()
    assert data.count(text) == 1
    path.write_bytes(data.replace(text, text[:-1] + b"x"))
    seal(copy, path)
    with pytest.raises(ArtifactError, match="hashes do not fit their texts"):
        verify_bank(BankVerifyConfig(bank=copy, device="cpu", sample=120))


def test_a_single_wrong_vector_is_named(copy: Path) -> None:
    vectors = np.load(copy / "vectors" / "vectors.npy", mmap_mode="r+")
    assert vectors[87].any()
    vectors[87] = np.roll(vectors[87], 1)
    vectors.flush()
    seal_shards(copy)
    with pytest.raises(ArtifactError, match=r"the vector of row 87 .* below min_cosine 0\.999"):
        verify_bank(BankVerifyConfig(bank=copy, device="cpu", sample=120))
    assert verify_bank(BankVerifyConfig(bank=copy, teacher="none"))["files"] == 5


@pytest.mark.parametrize(("sample", "seed"), [(10, 0), (10, 1), (100, 1), (1000, 0)])
def test_the_captions_drawn(sample: int, seed: int, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []
    encode = CaptionEncoder.encode

    def noted(self, texts):
        drawn.append(texts)
        return encode(self, texts)

    monkeypatch.setattr(CaptionEncoder, "encode", noted)
    report = verify_bank(BankVerifyConfig(bank=bank.folder, device="cpu", sample=sample, seed=seed))
    rows = np.sort(np.random.default_rng(seed).choice(120, min(sample, 120), replace=False))
    assert drawn == [[bank.text(row) for row in rows]] and report["sample"] == len(rows)


@pytest.mark.parametrize("settings", [{"prompt": "this is "}, {"precision": "bf16"}])
def test_captions_are_encoded_again_as_they_were(settings, captions_csv, build, tmp_path: Path) -> None:
    bank = build(captions_csv, tmp_path / "bank", dtype="float32", **settings)
    report = verify_bank(BankVerifyConfig(bank=bank.folder, device="cpu", sample=20))
    assert report["min_cosine"] > (0.99999 if "prompt" in settings else 0.9999)


def test_what_is_said(bank: Bank, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = verify_bank(BankVerifyConfig(bank=bank.folder, teacher="none"))
    paths = [*bank.folder.rglob("*.npy"), *(bank.folder / "table").iterdir()]
    assert report["bytes"] == sum(path.stat().st_size for path in paths)
    assert "captions encoded again" not in capsys.readouterr().out
    for shard in range(6):
        (copy / "vectors" / f"{shard:05d}.json").unlink()
    with pytest.raises(ArtifactError, match=r"damaged: vectors/00000\.json, .*vectors/00004\.json and 1 more; delete"):
        verify_bank(BankVerifyConfig(bank=copy, teacher="none"))


def test_cosines_by_hand() -> None:
    a = np.array([[0.3, 0.0], [0.0, 0.0], [0.0, 0.0], [5.0, 0.0], [0.0, 2.0]], np.float32)
    b = np.array([[0.3, 0.4], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, -0.1]], np.float32)
    np.testing.assert_allclose(cosines(a, b), [0.6, 1.0, 0.0, 0.0, -1.0], atol=1e-6)


def test_a_bank_of_one_caption_is_whole_and_says_what_was_encoded_again(
    tmp_path: Path, write_captions, build, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = build(write_captions(tmp_path / "a.csv", 1, columns={"raw": 1}), tmp_path / "bank")
    assert verify_bank(BankVerifyConfig(bank=bank.folder, device="cpu"))["sample"] == 1
    assert "1 captions encoded again: cosine at least 1.000" in capsys.readouterr().out
    with pytest.raises(UsageError, match="the device 'cuda:99' cannot be used"):
        verify_bank(BankVerifyConfig(bank=bank.folder, device="cuda:99"))
