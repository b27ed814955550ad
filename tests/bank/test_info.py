"""`bank info`: counts, lengths, sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llm2clip.bank.config import BankAddConfig, BankInfoConfig, BankMergeConfig
from llm2clip.bank.info import as_text, bank_facts, bank_info, histogram, summary
from llm2clip.bank.merge import add_to_bank, merge_banks
from llm2clip.bank.reader import Bank


def test_facts(bank: Bank, capsys: pytest.CaptureFixture[str]) -> None:
    facts = bank_info(BankInfoConfig(bank=bank.folder))
    assert (facts["num_samples"], facts["num_captions"], facts["num_rows"]) == (60, 120, 120)
    assert facts["kinds"]["short"]["tokens"] == {"mean": 6.0, "median": 6, "p95": 6, "longest": 6}
    assert facts["kinds"]["long"]["histogram"] == {"9-16": 60}
    assert facts["histogram"] == {"1-8": 60, "9-16": 60}
    assert facts["bytes"]["vectors"] > 120 * 64
    text = capsys.readouterr().out
    assert "32 x float16 in 8 shards" in text and bank.teacher_fingerprint in text


def test_json(bank: Bank, capsys: pytest.CaptureFixture[str]) -> None:
    facts = bank_info(BankInfoConfig(bank=bank.folder, json=True))
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(facts))


def test_blocks_make_no_difference(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm2clip.bank import info

    whole = info.token_counts_by_kind(bank)
    monkeypatch.setattr(info, "BLOCK_CAPTIONS", 7)
    np.testing.assert_array_equal(info.token_counts_by_kind(bank), whole)


def test_summary_and_histogram_by_hand() -> None:
    counts = np.bincount([1, 2, 2, 3, 100])
    assert summary(counts) == {"mean": 21.6, "median": 2, "p95": 100, "longest": 100}
    assert histogram(counts) == {"1-8": 4, "65-128": 1}
    assert histogram(np.bincount([0, 2000])) == {"unknown": 1, "1025+": 1}
    assert summary(np.zeros(1, int))["longest"] == 0


def test_ninety_five_per_cent() -> None:
    lengths = [1] * 92 + [5] * 4 + [9] * 4
    assert summary(np.bincount(lengths)) == {"mean": 1.48, "median": 1, "p95": 5, "longest": 9}


def test_sources_of_banks_that_were_added_to_and_merged(bank: Bank, captions_csv, write_captions, tmp_path) -> None:
    data = str(write_captions(tmp_path / "new" / "a.csv", 2, columns={"raw": 6}, first=100))
    more = add_to_bank(BankAddConfig(data=(data,), bank=bank.folder, out=tmp_path / "more", device="cpu"))
    merged = merge_banks(BankMergeConfig(banks=(bank.folder, more), out=tmp_path / "merged"))
    assert bank_facts(bank.folder)["sources"] == [str(captions_csv)]
    assert bank_facts(more)["sources"] == [str(bank.folder), data]
    assert bank_facts(merged)["sources"] == [str(bank.folder), str(more)]


def test_the_page_by_hand(bank: Bank) -> None:
    facts = bank_facts(bank.folder)
    sizes = {name: sum(file.stat().st_size for file in (bank.folder / name).iterdir()) for name in ("vectors", "table")}
    assert facts["bytes"] == sizes
    facts["teacher"]["prompt"] = "this is "
    facts |= {"num_captions": 200, "histogram": {"1-8": 150, "9-16": 50}, "num_samples": 1234}
    facts["bad_samples"]["num_bad"] = 5678
    lines = as_text(facts).splitlines()
    assert "prompt    'this is '" in lines
    assert "samples   1,234; bad and left out: 5,678" in lines
    assert "captions  200, distinct 120 (40.0% repeated), 1,320 tokens" in lines
    assert f"1-8                  150 {'█' * 40}" in lines and f"9-16                  50 {'█' * 13}" in lines
