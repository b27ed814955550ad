"""Exported banks open in the programs they are for, with the same rows."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from llm2clip.artifacts import write_json
from llm2clip.bank.build import build_bank
from llm2clip.bank.config import BankConfig, BankExportConfig
from llm2clip.bank.export import export_bank
from llm2clip.bank.reader import Bank
from llm2clip.errors import UsageError

BUFFER = io.BytesIO()
Image.new("L", (1, 1)).save(BUFFER, "PNG")
PNG = BUFFER.getvalue()


def check_rows(dataset, bank: Bank, kinds: list[str]) -> None:
    dataset = dataset.with_format("numpy")
    expected = [(i, kind) for i in range(60) for kind in bank.kinds if kind in kinds]
    assert len(dataset) == len(expected)
    for place in (0, 1, 17, len(expected) - 1):
        (i, kind), row = expected[place], dataset[place]
        assert (row["id"], row["kind"], row["path"]) == (bank.sample_id(i), kind, bank.image(i).path)
        (number,) = bank.rows(i, kind)
        assert row["caption"] == bank.text(number)
        np.testing.assert_array_equal(row["vector"], bank.vectors([number])[0])


@pytest.mark.parametrize("kinds", [(), ("long",)])
def test_round_trip(kinds: tuple[str, ...], bank: Bank, tmp_path: Path) -> None:
    out = export_bank(BankExportConfig(bank=bank.folder, out=tmp_path / "out", rows_per_file=50, kinds=kinds))
    for name, options in ((str(out), {}), ("parquet", {"data_dir": str(out)})):  # the latter is what the docs say
        dataset = load_dataset(name, split="train", cache_dir=str(tmp_path / "cache"), **options)
        check_rows(dataset, bank, list(kinds) or bank.kinds)
    assert len(list(out.rglob("*.parquet"))) == 3


def test_an_export_goes_on_where_it_stopped(bank: Bank, tmp_path: Path, monkeypatch, files_of) -> None:
    from llm2clip.bank import export

    config = BankExportConfig(bank=bank.folder, out=tmp_path / "out", rows_per_file=50)
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
    whole = BankExportConfig(bank=bank.folder, out=tmp_path / "whole", rows_per_file=50)
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


def test_a_file_name_that_is_no_utf8(tmp_path: Path, build, write_captions) -> None:
    write_captions(tmp_path / "a.csv", 1, columns={"raw": 3})
    os.rename(tmp_path / "0.jpg", os.fsencode(tmp_path) + b"/b\xe9.jpg")
    (tmp_path / "a.csv").write_bytes(b"image,raw\nb\xe9.jpg,a red disc\n")
    bank = build(tmp_path / "a.csv", tmp_path / "bank")
    out = export_bank(BankExportConfig(bank=bank.folder, out=tmp_path / "out"))
    dataset = load_dataset("parquet", data_dir=str(out), cache_dir=str(tmp_path / "cache"))["train"]
    assert dataset[0]["path"] == str(tmp_path / "b\\xe9.jpg")


def test_where_images_lie_is_told(tmp_path: Path, tiny_llm: Path) -> None:
    """A range of a tar, by Python's own tarfile, and a cell of a table; captions that samples share."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (("a.jpg", PNG), ("a.txt", b"a red disc"), ("b.jpg", PNG), ("b.txt", b"a red disc")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    cells = [{"image": PNG, "caption": "a blue square"}, {"image": PNG, "caption": "a red disc"}]
    pq.write_table(pa.Table.from_pylist(cells), tmp_path / "t.parquet")
    data = (str(tmp_path / "0.tar"), str(tmp_path / "t.parquet"))
    settings = {"precision": "fp32", "device": "cpu", "teacher": str(tiny_llm)}
    bank = Bank.open(build_bank(BankConfig(data=data, out=tmp_path / "bank", **settings)))
    exported = export_bank(BankExportConfig(bank=bank.folder, out=tmp_path / "out", rows_per_file=3))
    rows = list(load_dataset("parquet", data_dir=str(exported), cache_dir=str(tmp_path / "cache"))["train"])
    with tarfile.open(tmp_path / "0.tar") as tar:
        offsets = {member.name: member.offset_data for member in tar}
    places = [(row["path"], row["offset"], row["length"], row["column"]) for row in rows]
    assert places == [
        (data[0], offsets["a.jpg"], len(PNG), ""),
        (data[0], offsets["b.jpg"], len(PNG), ""),
        (data[1], 0, -1, "image"),
        (data[1], 1, -1, "image"),
    ]
    assert [row["caption"] for row in rows] == ["a red disc", "a red disc", "a blue square", "a red disc"]
    assert rows[0]["vector"] == rows[3]["vector"] != rows[2]["vector"]


def test_files_are_as_many_as_needed(bank: Bank, tmp_path: Path) -> None:
    for rows, count in ((60, 2), (59, 3), (120, 1), (121, 1)):
        config = BankExportConfig(bank=bank.folder, out=tmp_path / str(rows), rows_per_file=rows)
        assert len(list(export_bank(config).rglob("*.parquet"))) == count


def test_several_kinds(bank: Bank, tmp_path: Path) -> None:
    for kinds, count in (((), 120), (("short",), 60), (("long", "short"), 120)):
        out = export_bank(BankExportConfig(bank=bank.folder, out=tmp_path / "-".join(("out", *kinds)), kinds=kinds))
        assert pq.read_table(out / "data").num_rows == count


def test_a_bank_made_anew_is_not_taken_for_exported(bank: Bank, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bank.folder, tmp_path / "bank"))
    config = BankExportConfig(bank=copy, out=tmp_path / "out")
    export_bank(config)
    write_json(copy / "manifest.json", {**bank.manifest, "fingerprint": "0" * 16})
    with pytest.raises(UsageError, match="bank_fingerprint was "):
        export_bank(config)
