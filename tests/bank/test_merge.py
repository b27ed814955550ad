"""Banks out of banks: equal captions once, captions of one image together, nothing encoded twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm2clip.artifacts import fingerprint, is_complete
from llm2clip.bank.config import BankAddConfig, BankMergeConfig, BankVerifyConfig
from llm2clip.bank.encoder import CaptionEncoder
from llm2clip.bank.merge import add_to_bank, merge_banks
from llm2clip.bank.reader import Bank
from llm2clip.bank.verify import check_files, check_table, cosines, verify_bank
from llm2clip.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path, write_captions) -> Path:
    """Two tables of the same folder: images 0..9 with short captions, 5..14 with long ones."""
    write_captions(tmp_path / "short.csv", 10, columns={"short_caption": 4})
    write_captions(tmp_path / "long.csv", 10, columns={"long_caption": 12}, first=5)
    return tmp_path


def same_as(bank: Bank, other: Bank) -> None:
    """Every sample of `other` is in `bank`, with its captions and vectors."""
    samples = {bank.sample_id(i): i for i in range(bank.num_samples)}
    for i in range(other.num_samples):
        sample = other.sample(i)
        mine = samples[sample.id]
        for kind in sample.captions:
            texts = [bank.text(row) for row in bank.rows(mine, kind)]
            assert texts == list(sample.captions[kind])
            vectors = bank.vectors(bank.rows(mine, kind)), other.vectors(other.rows(i, kind))
            assert cosines(*(v.astype(np.float32) for v in vectors)).min() > 0.9999


def test_merge(folder: Path, build) -> None:
    short, long = build(folder / "short.csv", folder / "a"), build(folder / "long.csv", folder / "b")
    merged = Bank.open(merge_banks(BankMergeConfig(banks=(short.folder, long.folder), out=folder / "merged")))
    assert (merged.num_samples, merged.num_rows, merged.kinds) == (15, 20, ["short", "long"])
    same_as(merged, short)
    same_as(merged, long)
    assert set(merged.sample(7).captions) == {"short", "long"}
    np.testing.assert_array_equal(merged.vectors(range(10)), short.vectors(range(10)))
    check_files(merged)
    check_table(merged)


def test_merging_again_does_nothing(folder: Path, build, files_of) -> None:
    banks = tuple(build(folder / f"{name}.csv", folder / name).folder for name in ("short", "long"))
    config = BankMergeConfig(banks=banks, out=folder / "merged")
    merge_banks(config)
    before = files_of(folder / "merged")
    merge_banks(config)
    assert files_of(folder / "merged") == before


def test_merging_a_bank_with_itself_changes_nothing(bank: Bank, tmp_path: Path) -> None:
    merged = Bank.open(merge_banks(BankMergeConfig(banks=(bank.folder, bank.folder), out=tmp_path / "merged")))
    assert [merged.sample(i) for i in range(60)] == [bank.sample(i) for i in range(60)]
    assert merged.num_samples == 60 and merged.num_rows == 120


def test_banks_that_do_not_fit(folder: Path, bank: Bank, build) -> None:
    prompted = build(folder / "short.csv", folder / "prompted", prompt="this is ")
    exact = build(folder / "short.csv", folder / "exact", dtype="float32")
    with pytest.raises(UsageError, match="built with the prompt 'this is '"):
        merge_banks(BankMergeConfig(banks=(bank.folder, prompted.folder), out=folder / "x"))
    with pytest.raises(UsageError, match="holds float16 vectors, which cannot become float32"):
        merge_banks(BankMergeConfig(banks=(exact.folder, bank.folder), out=folder / "y"))
    with pytest.raises(UsageError, match="names 1; give two or more"):
        BankMergeConfig(banks=(bank.folder,), out=folder / "z")


def test_banks_of_two_precisions(folder: Path, bank: Bank, build, captions_csv: Path) -> None:
    half = build(folder / "short.csv", folder / "half", precision="bf16")
    with pytest.raises(UsageError, match=f"{half.folder} was built in bf16, not fp32: .*again with precision='fp32'"):
        merge_banks(BankMergeConfig(banks=(bank.folder, half.folder), out=folder / "x"))
    config = {"data": (str(captions_csv),), "out": folder / "x", "device": "cpu"}
    with pytest.raises(UsageError, match=r"was built in bf16, not fp32: .*; leave out precision"):
        add_to_bank(BankAddConfig(bank=half.folder, precision="fp32", **config))
    assert not (folder / "x").exists()
    more = Bank.open(add_to_bank(BankAddConfig(bank=half.folder, **config)))
    assert more.manifest["teacher"]["precision"] == "bf16"


def test_add_a_kind_encodes_only_what_is_new(folder: Path, build, monkeypatch: pytest.MonkeyPatch) -> None:
    short = build(folder / "short.csv", folder / "a")
    encoded: list[int] = []
    run = CaptionEncoder.run

    def counted(self, prepared, sink):
        encoded.append(sum(len(batch) for batch in prepared.batches))
        return run(self, prepared, sink)

    monkeypatch.setattr(CaptionEncoder, "run", counted)
    config = BankAddConfig(data=(str(folder / "long.csv"),), bank=short.folder, out=folder / "more", device="cpu")
    more = Bank.open(add_to_bank(config))
    assert sum(encoded) == 10
    assert (more.num_samples, more.num_rows, more.kinds) == (15, 20, ["short", "long"])
    same_as(more, short)
    same_as(more, build(folder / "long.csv", folder / "b"))
    assert more.manifest["teacher"] == short.manifest["teacher"]
    encoded.clear()
    add_to_bank(config)
    assert encoded == []
    assert not list((folder / "more").glob(".*"))


def test_adding_captions_that_are_there_encodes_nothing(bank: Bank, captions_csv: Path, tmp_path: Path) -> None:
    config = BankAddConfig(
        data=(str(captions_csv),),
        captions={"copy": "short_caption"},
        bank=bank.folder,
        out=tmp_path / "x",
        device="cpu",
    )
    more = Bank.open(add_to_bank(config))
    assert more.num_rows == bank.num_rows and more.kinds == ["short", "long", "copy"]
    assert more.rows(3, "copy").tolist() == more.rows(3, "short").tolist()


def test_adding_with_another_teacher_is_refused(bank: Bank, captions_csv: Path, tmp_path: Path, tiny_llm: Path) -> None:
    from llm2clip.teacher.model import llm_as_encoder

    other = llm_as_encoder(tiny_llm, pooling="last-token", device="cpu")
    other.save_pretrained(str(tmp_path / "other"), create_model_card=False)
    with pytest.raises(UsageError, match="built by another teacher") as error:
        add_to_bank(
            BankAddConfig(
                data=(str(captions_csv),), bank=bank.folder, out=tmp_path / "x", teacher=str(tmp_path / "other")
            )
        )
    assert bank.teacher_fingerprint in str(error.value)


def test_three_banks_are_merged_and_all_are_checked(folder: Path, build, write_captions) -> None:
    zh = write_captions(folder / "zh.csv", 4, columns={"caption_zh": 5}, first=8)
    names = {"a": folder / "short.csv", "b": folder / "long.csv", "c": zh}
    banks = [build(data, folder / name) for name, data in names.items()]
    config = BankMergeConfig(banks=tuple(bank.folder for bank in banks), out=folder / "merged")
    merged = Bank.open(merge_banks(config))
    assert (merged.num_samples, merged.num_rows, merged.kinds) == (15, 24, ["short", "long", "zh"])
    for bank in banks:
        same_as(merged, bank)
    assert set(merged.sample(8).captions) == {"short", "long", "zh"}
    assert merged.manifest["source_fingerprint"] == fingerprint([bank.fingerprint for bank in banks])
    assert merged.manifest["shard_rows"] == 16
    prompted = build(zh, folder / "prompted", prompt="this is ")
    with pytest.raises(UsageError, match="built with the prompt 'this is '"):
        merge_banks(BankMergeConfig(banks=(*config.banks[:2], prompted.folder), out=folder / "x"))
    int8 = build(zh, folder / "int8", dtype="int8")
    with pytest.raises(UsageError, match="holds int8 vectors, which cannot become float16"):
        merge_banks(BankMergeConfig(banks=(*config.banks[:2], int8.folder), out=folder / "y"))


def test_what_was_bad_is_summed_up(folder: Path, build) -> None:
    def spoil(name: str, missing: int) -> Path:
        data = folder / f"{name}.csv"
        data.write_text(data.read_text() + "".join(f"gone{name}{i}.jpg,a red disc\n" for i in range(missing)))
        return data

    banks = [build(spoil(name, n), folder / name, max_bad_fraction=0.5) for name, n in (("short", 1), ("long", 2))]
    merged = Bank.open(merge_banks(BankMergeConfig(banks=tuple(b.folder for b in banks), out=folder / "merged")))
    config = {"bank": banks[0].folder, "out": folder / "more", "device": "cpu", "max_bad_fraction": 0.5}
    more = Bank.open(add_to_bank(BankAddConfig(data=(str(folder / "long.csv"),), **config)))
    for bank in (merged, more):
        assert bank.manifest["bad_samples"]["num_bad"] == 3
        assert bank.manifest["bad_samples"]["counts"] == {"missing file": 3}


def test_a_bank_that_grows_keeps_prompt_dtype_and_shard_rows(folder: Path, build) -> None:
    """Also when it is made in two parts, by jobs that do not wait for each other."""
    base = build(folder / "short.csv", folder / "a", prompt="this is ", dtype="int8", shard_rows=4)
    data = {"data": (str(folder / "long.csv"),), "bank": base.folder, "device": "cpu"}
    for part, whole in (("0/2", False), ("1/2", True)):
        out = add_to_bank(BankAddConfig(out=folder / "more", shard=part, **data))
        assert is_complete(out) == whole
    more = Bank.open(out)
    assert (more.manifest["teacher"], more.dtype) == (base.manifest["teacher"], "int8")
    assert [len(more.layout.rows(shard)) for shard in range(more.layout.num_shards)] == [4, 4, 4, 4, 4]
    np.testing.assert_array_equal(more.vectors(range(10)), base.vectors(range(10)))
    assert verify_bank(BankVerifyConfig(bank=more.folder, device="cpu"))["min_cosine"] > 0.999
    other = Bank.open(add_to_bank(BankAddConfig(out=folder / "other", captions={"x": "long_caption"}, **data)))
    assert len({base.fingerprint, *(b.manifest["source_fingerprint"] for b in (base, more, other))}) == 4
