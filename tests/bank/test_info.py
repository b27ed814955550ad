"""`bank info`: counts, lengths, sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llm2clip.bank.config import BankInfoConfig
from llm2clip.bank.info import bank_info, histogram, summary
from llm2clip.bank.reader import Bank


def test_facts(bank: Bank, capsys: pytest.CaptureFixture[str]) -> None:
    facts = bank_info(BankInfoConfig(bank=bank.folder))
    assert (facts["num_samples"], facts["num_captions"], facts["num_rows"]) == (60, 120, 120)
    assert facts["kinds"]["short"]["tokens"] == {"mean": 6.0, "median": 6, "p95": 6, "longest": 6}
    assert facts["kinds"]["long"]["histogram"] == {"9-16": 60}
    assert facts["histogram"] == {"1-8": 60, "9-16": 60}
    assert facts["bytes"]["vectors"] > 120 * 64
    text = capsys.readouterr().out
    assert "32 x float16 in 8 files" in text and bank.teacher_fingerprint in text


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
