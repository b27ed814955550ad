"""Rows of CSV, TSV and JSON tables, damaged ones told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm2clip.data.rows import BadRow, CsvTable, JsonTable
from llm2clip.errors import SourceError


def csv_rows(path: Path, content: str | bytes) -> list[dict[str, Any] | BadRow]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(CsvTable(str(path)).rows())


def test_plain_csv_with_quotes_newlines_and_unicode(tmp_path: Path) -> None:
    content = 'image,caption\na.jpg,"two, ""three""\nlines"\n\nb.jpg,狗 🐕\r\nc.jpg,\n'
    assert csv_rows(tmp_path / "a.csv", content) == [
        {"image": "a.jpg", "caption": 'two, "three"\nlines'},
        {"image": "b.jpg", "caption": "狗 🐕"},
        {"image": "c.jpg", "caption": ""},
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks(tmp_path: Path, encoding: str) -> None:
    rows = csv_rows(tmp_path / "a.csv", "image,caption\na.jpg,é\n".encode(encoding))
    assert rows == [{"image": "a.jpg", "caption": "é"}]


@pytest.mark.parametrize(("name", "separator"), [("a.tsv", "\t"), ("a.csv", "\t"), ("a.csv", ";"), ("a.csv", ",")])
def test_separators(tmp_path: Path, name: str, separator: str) -> None:
    content = f'image{separator}caption\na.jpg{separator}"x{separator}y"\n'
    assert csv_rows(tmp_path / name, content) == [{"image": "a.jpg", "caption": f"x{separator}y"}]


def test_rows_of_another_width(tmp_path: Path) -> None:
    rows = csv_rows(tmp_path / "a.csv", "image,caption,more\na.jpg,x\nb.jpg,x,y,z\n")
    assert rows == [{"image": "a.jpg", "caption": "x"}, BadRow("4 fields where the header has 3")]


def test_a_quote_inside_a_line_is_a_character(tmp_path: Path) -> None:
    rows = csv_rows(tmp_path / "a.tsv", 'image\tcaption\na.jpg\ta 5" disc\nb.jpg\t"Big" dog\nc.jpg\tx\n')
    assert [row["caption"] for row in rows if isinstance(row, dict)] == ['a 5" disc', "Big dog", "x"]


def test_a_quote_never_closed_costs_its_own_line_only(tmp_path: Path) -> None:
    lines = [f"{i}.jpg,short {i},long {i}" for i in range(50)]
    lines[20] = '20.jpg,"never closed,long'
    rows = csv_rows(tmp_path / "a.csv", "image,short,long\n" + "\n".join(lines))
    good = [row["image"] for row in rows if isinstance(row, dict)]
    assert good == [f"{i}.jpg" for i in range(50) if i != 20]
    assert [row for row in rows if isinstance(row, BadRow)] == [
        BadRow("2 fields where the header has 3, or a quote that is not closed")
    ]


def test_two_stray_quotes_do_not_swallow_what_lies_between(tmp_path: Path) -> None:
    lines = [f"{i}.jpg,caption {i}" for i in range(30)]
    lines[5], lines[9] = '5.jpg,"stray', '9.jpg,"another" one'
    rows = csv_rows(tmp_path / "a.csv", "image,caption\n" + "\n".join(lines))
    assert [row["image"] for row in rows if isinstance(row, dict)] == [f"{i}.jpg" for i in range(30)]
    assert rows[5] == {"image": "5.jpg", "caption": "stray\n"}


def test_a_field_that_is_too_long_is_one_damaged_row(tmp_path: Path) -> None:
    rows = csv_rows(tmp_path / "a.csv", f"image,caption\na.jpg,{'x' * 200_000}\nb.jpg,y\n")
    assert rows == [BadRow("field larger than field limit (131072)"), {"image": "b.jpg", "caption": "y"}]


def test_bytes_that_are_no_utf_8_survive_to_be_counted(tmp_path: Path) -> None:
    rows = csv_rows(tmp_path / "a.csv", b"image,caption\na.jpg,a\xe9\n")
    assert rows == [{"image": "a.jpg", "caption": "a\udce9"}]


def test_an_empty_table(tmp_path: Path) -> None:
    for content in (b"", b"\n"):
        (tmp_path / "a.csv").write_bytes(content)
        with pytest.raises(SourceError, match="is empty; its first line must name the columns"):
            CsvTable(str(tmp_path / "a.csv"))
    with pytest.raises(SourceError, match=r"b\.csv cannot be read: No such file"):
        CsvTable(str(tmp_path / "b.csv"))


def test_json_lines(tmp_path: Path) -> None:
    lines = ['{"image": "a.jpg", "caption": ["x\\u2028", "狗"]}', "", "{broken", "7", '{"b": 1}', '{"image": "cut']
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    table = JsonTable(str(tmp_path / "a.jsonl"))
    assert table.columns == ["image", "caption", "b"]
    rows = list(table.rows())
    assert rows[0] == {"image": "a.jpg", "caption": ["x\u2028", "狗"]}
    assert [row.detail.split(":")[0] for row in rows if isinstance(row, BadRow)] == [
        "no JSON",
        "7 is no JSON object",
        "no JSON",
    ]


def test_a_json_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.jpg", "caption": "x"}, 3], indent=1))
    table = JsonTable(str(tmp_path / "a.json"))
    assert list(table.rows()) == [{"image": "a.jpg", "caption": "x"}, BadRow("3 is no JSON object")]
    (tmp_path / "a.json").write_text('[{"image": "a.jpg"},')
    with pytest.raises(SourceError, match="is damaged JSON"):
        JsonTable(str(tmp_path / "a.json"))


@pytest.mark.parametrize("content", ["", "[]", "1\n2\n", "[[" * 5000, '{"a": ' * 100_000])
def test_json_without_objects(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(SourceError):
        JsonTable(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("damage", [b"x", b"\x00\xd8\n\x00"], ids=["cut off", "half a pair"])
def test_damaged_utf_16_costs_a_character(tmp_path: Path, damage: bytes) -> None:
    content = b"\xff\xfe" + "image,caption\n0.jpg,圆 disc\n1.jpg,b".encode("utf-16-le") + damage
    assert csv_rows(tmp_path / "a.csv", content) == [
        {"image": "0.jpg", "caption": "圆 disc"},
        {"image": "1.jpg", "caption": "b\ufffd"},
    ]
