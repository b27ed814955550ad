"""Captions that the teacher reads only the beginning of: counted by every verb that fills a bank."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llm2clip.bank.build import build_bank
from llm2clip.bank.config import BankAddConfig, BankConfig, BankMergeConfig
from llm2clip.bank.info import as_text, bank_facts
from llm2clip.bank.merge import add_to_bank, merge_banks
from llm2clip.teacher.model import llm_as_encoder, save

LIMIT = 8
"""Tokens read: the begin token and seven words."""


@pytest.fixture(scope="module")
def short_teacher(tmp_path_factory: pytest.TempPathFactory, tiny_llm: Path) -> Path:
    """A teacher that reads eight tokens."""
    folder = tmp_path_factory.mktemp("teachers") / "short"
    save(llm_as_encoder(tiny_llm, max_length=LIMIT, device="cpu"), folder, attention="two-way")
    return folder


def table(folder: Path, words: list[int], *, first: int = 0) -> Path:
    """A CSV of captions of so many words, each of another image and of another last word."""
    folder.mkdir(exist_ok=True)
    for i in range(len(words)):
        Image.new("RGB", (8, 8), (first + i, 0, 0)).save(folder / f"{first + i}.png")
    rows = [f"{first + i}.png,{'red ' * (n - 1)}{('disc', 'square')[first > 0]}" for i, n in enumerate(words)]
    (folder / "captions.csv").write_text("image,caption\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return folder / "captions.csv"


def build(data: Path, teacher: Path, out: Path, **settings: Any) -> dict[str, Any]:
    build_bank(
        BankConfig(data=(str(data),), teacher=str(teacher), out=str(out), precision="fp32", device="cpu", **settings)
    )
    return manifest(out)


def manifest(out: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    return facts


def test_a_bank_counts_and_says_it_once(tmp_path: Path, short_teacher: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of 1, 7, 8 and 20 words two are more than seven; the same caption again is one row."""
    data = table(tmp_path / "data", [1, 7, 8, 20, 20])
    with caplog.at_level(logging.WARNING, logger="llm2clip"):
        facts = build(data, short_teacher, tmp_path / "bank", shard_rows=2)
    assert facts["cut"] == {"rows": 2, "limit": LIMIT}
    assert [shard["cut"] for shard in facts["shards"]] == [0, 2]
    assert [line for line in caplog.messages if "cut" in line] == [
        "2 of 4 distinct captions (50.0%) are longer than 8 tokens: their ends are cut "
        "(a joined teacher cuts for the member that reads least)"
    ]
    page = as_text(bank_facts(tmp_path / "bank"))
    assert "cut       2 distinct captions (50.0%) are longer than the 8 tokens read" in page.splitlines()


def test_a_bank_without_cuts_is_silent(tmp_path: Path, short_teacher: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="llm2clip"):
        facts = build(table(tmp_path / "data", [1, 7]), short_teacher, tmp_path / "bank")
    assert facts["cut"] == {"rows": 0, "limit": LIMIT}
    assert not caplog.messages


def test_copied_captions_count(tmp_path: Path, short_teacher: Path) -> None:
    """Among the copied is one of exactly eight tokens, which was not cut."""
    build(table(tmp_path / "a", [1, 7, 8, 20]), short_teacher, tmp_path / "first")
    more = table(tmp_path / "b", [2, 9], first=10)
    add_to_bank(
        BankAddConfig(bank=str(tmp_path / "first"), data=(str(more),), out=str(tmp_path / "added"), device="cpu")
    )
    assert manifest(tmp_path / "added")["cut"] == {"rows": 3, "limit": LIMIT}


def test_a_merge_counts_what_fills_the_limit(tmp_path: Path, short_teacher: Path) -> None:
    """No teacher is at hand to tell a caption that fits exactly from one that was cut."""
    for name, words, first in (("a", [1, 8], 0), ("b", [7, 9], 10)):
        build(table(tmp_path / name, words, first=first), short_teacher, tmp_path / f"bank-{name}")
    banks = tuple(str(tmp_path / f"bank-{name}") for name in "ab")
    merge_banks(BankMergeConfig(banks=banks, out=str(tmp_path / "merged")))
    assert manifest(tmp_path / "merged")["cut"] == {"rows": 3, "limit": LIMIT}


def test_a_bank_that_did_not_count_has_no_line(tmp_path: Path, short_teacher: Path) -> None:
    facts = build(table(tmp_path / "data", [20]), short_teacher, tmp_path / "bank")
    del facts["cut"]
    (tmp_path / "bank/manifest.json").write_text(json.dumps(facts), encoding="utf-8")
    assert "cut  " not in as_text(bank_facts(tmp_path / "bank"))
