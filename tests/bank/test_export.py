"""Exported banks open in the programs they are for, with the same rows."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset, load_from_disk

from llm2clip.bank.config import BankExportConfig
from llm2clip.bank.export import export_bank
from llm2clip.bank.reader import Bank
from llm2clip.errors import UsageError


def check_rows(dataset, bank: Bank, kinds: list[str]) -> None:
    dataset = dataset.with_format("numpy")
    expected = [(i, kind) for i in range(60) for kind in bank.kinds if kind in kinds]
    assert len(dataset) == len(expected)
    for place in (0, 1, 17, len(expected) - 1):
        (i, kind), row = expected[place], dataset[place]
        assert (row["id"], row["kind"], row["path"]) == (bank.sample_id(i), kind, bank.picture(i).path)
        (number,) = bank.rows(i, kind)
        assert row["caption"] == bank.text(number)
        np.testing.assert_array_equal(row["vector"], bank.vectors([number])[0])


@pytest.mark.parametrize("kinds", [(), ("long",)])
@pytest.mark.parametrize("to", ["parquet", "datasets"])
def test_round_trip(to: str, kinds: tuple[str, ...], bank: Bank, tmp_path: Path) -> None:
    out = export_bank(BankExportConfig(bank=bank.folder, out=tmp_path / "out", to=to, rows_per_file=50, kinds=kinds))
    if to == "parquet":
        dataset = load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    else:
        dataset = load_from_disk(str(out))
    check_rows(dataset, bank, list(kinds) or bank.kinds)
    assert len(list(out.rglob("*.parquet" if to == "parquet" else "*.arrow"))) == 3


@pytest.mark.parametrize("to", ["parquet", "datasets"])
def test_an_export_goes_on_where_it_stopped(to: str, bank: Bank, tmp_path: Path, monkeypatch, files_of) -> None:
    from llm2clip.bank import export

    config = BankExportConfig(bank=bank.folder, out=tmp_path / "out", to=to, rows_per_file=50)
    rows_of = export.rows_of

    def interrupted(bank, captions, kinds):
        if captions.start == 100:
            raise KeyboardInterrupt
        return rows_of(bank, captions, kinds)

    monkeypatch.setattr(export, "rows_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_bank(config)
    monkeypatch.setattr(export, "rows_of", rows_of)
    export_bank(config)
    whole = BankExportConfig(bank=bank.folder, out=tmp_path / "whole", to=to, rows_per_file=50)
    assert files_of(tmp_path / "out") == files_of(export_bank(whole))


def test_exporting_again_does_nothing(bank: Bank, tmp_path: Path, files_of) -> None:
    config = BankExportConfig(bank=bank.folder, out=tmp_path / "out")
    before = files_of(export_bank(config))
    assert files_of(export_bank(config)) == before


def test_the_folder_may_be_empty_but_not_in_use(bank: Bank, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_bank(BankExportConfig(bank=bank.folder, out=tmp_path / "out"))
    with pytest.raises(UsageError, match="rows_per_file was 65536, now 7"):
        export_bank(BankExportConfig(bank=bank.folder, out=tmp_path / "out", rows_per_file=7))
    with pytest.raises(UsageError, match="holds a bank"):
        export_bank(BankExportConfig(bank=bank.folder, out=bank.folder))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.txt").touch()
    with pytest.raises(UsageError, match="holds files of another program"):
        export_bank(BankExportConfig(bank=bank.folder, out=tmp_path / "thesis"))


def test_an_unknown_kind(bank: Bank, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'lng' is unknown"):
        export_bank(BankExportConfig(bank=bank.folder, out=tmp_path / "out", kinds=("lng",)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["parquet", "datasets"])
def test_a_file_name_that_is_no_utf8(to: str, tmp_path: Path, build, write_captions) -> None:
    write_captions(tmp_path / "a.csv", 1, columns={"raw": 3})
    os.rename(tmp_path / "0.jpg", os.fsencode(tmp_path) + b"/b\xe9.jpg")
    (tmp_path / "a.csv").write_bytes(b"image,raw\nb\xe9.jpg,a red disc\n")
    bank = build(tmp_path / "a.csv", tmp_path / "bank")
    out = export_bank(BankExportConfig(bank=bank.folder, out=tmp_path / "out", to=to))
    dataset = load_from_disk(str(out)) if to == "datasets" else load_dataset("parquet", data_dir=str(out))["train"]
    assert dataset[0]["path"] == str(tmp_path / "b\\xe9.jpg")
