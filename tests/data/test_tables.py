"""Samples of tables: paths and embedded images, several rows of one image, what is bad."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2clip.data.bytes import KeptByThread, ParquetCells, open_cells, read_bytes
from llm2clip.data.images import load_image
from llm2clip.data.sample import ImageRef
from llm2clip.data.source import Source
from llm2clip.errors import SourceError, TooManyBadSamples, UsageError

Open = Callable[..., Source]
ROWS = [{"image": f"{i}.jpg", "short_caption": f"short {i}", "long_caption": f"long, {i} 狗"} for i in range(4)]


@pytest.fixture
def folder(tmp_path: Path, jpeg: bytes) -> Path:
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg)
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """`rows` as the kind of table that the ending says."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_kind_of_table_gives_the_same_samples(folder: Path, source_of: Open, ending: str) -> None:
    samples = list(source_of(write(folder / f"t.{ending}", ROWS)))
    assert [sample.id for sample in samples] == [f"{i}.jpg" for i in range(4)]
    assert samples[2].captions == {"short": ("short 2",), "long": ("long, 2 狗",)}
    assert samples[2].image == ImageRef(str(folder / "2.jpg"))
    assert load_image(samples[2].image).size == (12, 8)


def test_named_columns_and_lists_of_captions(folder: Path, source_of: Open) -> None:
    rows = [{"p": "0.jpg", "a": ["one", "two"], "b": "three", "image": "nonsense"}]
    for ending in ("jsonl", "parquet"):
        source = source_of(write(folder / f"t.{ending}", rows), captions={"short": "a,b"}, image="p")
        assert [dict(sample.captions) for sample in source] == [{"short": ("one", "two", "three")}]


def test_a_missing_column_is_wrong_use(folder: Path, source_of: Open) -> None:
    table = write(folder / "t.csv", ROWS)
    with pytest.raises(
        UsageError, match=r"has no column 'dense' \(captions={'long': 'dense'}\); its columns are image, sh"
    ):
        source_of(table, captions={"long": "dense"})
    with pytest.raises(UsageError, match="looks like images; give image='COLUMN'"):
        source_of(write(folder / "u.csv", [{"a": "0.jpg", "caption": "x"}]))
    with pytest.raises(UsageError, match=r"looks like captions; give captions=\{'KIND': 'COLUMN'\}"):
        source_of(write(folder / "v.csv", [{"image": "0.jpg", "b": "x"}]))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_rows_of_one_image_are_one_sample_wherever_they_stand(folder: Path, source_of: Open, ending: str) -> None:
    pairs = [("0.jpg", "a"), ("1.jpg", "b"), ("1.jpg", "c"), ("0.jpg", "d"), ("2.jpg", "e"), ("0.jpg", "a")]
    source = source_of(write(folder / f"t.{ending}", [{"image": image, "caption": text} for image, text in pairs]))
    found = [(sample.id, sample.captions["raw"]) for sample in source]
    assert found == [("1.jpg", ("b", "c")), ("2.jpg", ("e",)), ("0.jpg", ("a", "d"))]


def test_bad_samples_are_counted_by_cause(folder: Path, source_of: Open, jpeg: bytes) -> None:
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_text("<html>")
    rows = [
        *ROWS,
        *(
            {"image": name, "short_caption": "x", "long_caption": ""}
            for name in ("empty.jpg", "page.jpg", "no.jpg", "")
        ),
    ]
    rows.append({"image": "0.jpg ", "short_caption": " ", "long_caption": ""})
    rows[3] = {"image": "3.jpg", "short_caption": "", "long_caption": "\t"}
    source = source_of(write(folder / "t.csv", rows))
    assert [sample.id for sample in source] == ["1.jpg", "2.jpg", "0.jpg"]
    assert source.bad.counts == {
        "empty caption": 8,
        "no caption": 1,
        "empty image": 1,
        "not an image": 1,
        "missing file": 1,
        "no image": 1,
    }
    assert source.bad.num_bad == 5
    with pytest.raises(TooManyBadSamples, match=r"5 of 8 samples are bad, above max_bad_fraction 0\.5"):
        list(source_of(folder / "t.csv", max_bad_fraction=0.5))


def test_damaged_rows_are_counted(folder: Path, source_of: Open) -> None:
    (folder / "t.jsonl").write_text(json.dumps(ROWS[0]) + "\n{cut\n[1]\n" + json.dumps(ROWS[1]))
    source = source_of(folder / "t.jsonl")
    assert [sample.id for sample in source] == ["0.jpg", "1.jpg"]
    assert source.bad.counts == {"damaged row": 2}
    assert source.bad.examples["damaged row"][0].startswith(f"row 1: {folder}/t.jsonl: no JSON")


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/passwd", "https://host/x.jpg"])
def test_images_outside_the_folder_are_refused_at_once(folder: Path, source_of: Open, name: str) -> None:
    table = write(folder / "t.csv", [{"image": name, "caption": "x"}])
    with pytest.raises(UsageError, match="lies outside the table's folder; move it or add allow_outside=True"):
        source_of(table)


def test_images_outside_the_folder_if_allowed(folder: Path, source_of: Open) -> None:
    (folder / "tables").mkdir()
    table = write(folder / "tables" / "t.csv", [{"image": "../0.jpg", "caption": "x"}])
    assert [sample.image.path for sample in source_of(table, allow_outside=True)] == [str(folder / "0.jpg")]


@pytest.mark.parametrize("as_image", [True, False])
def test_embedded_images(folder: Path, source_of: Open, jpeg: bytes, make_image: Any, as_image: bool) -> None:
    encoded = [jpeg, make_image((5, 7)), b"", b"<html>", None, make_image((9, 3), form="PNG")]
    cells = [{"bytes": data, "path": None} for data in encoded] if as_image else encoded
    table = write(folder / "t.parquet", [{"image": cell, "caption": f"c{i}"} for i, cell in enumerate(cells)])
    source = source_of(table)
    samples = list(source)
    assert [(sample.id, sample.captions["raw"]) for sample in samples] == [(i, (f"c{i}",)) for i in "015"]
    assert samples[1].image == ImageRef(str(table), offset=1, length=-1, column="image")
    assert [load_image(sample.image).size for sample in samples] == [(12, 8), (5, 7), (9, 3)]
    assert source.bad.counts == {"empty image": 1, "not an image": 1, "no image": 1}


def test_an_image_column_may_hold_paths(folder: Path, source_of: Open, jpeg: bytes) -> None:
    cells = [{"bytes": None, "path": "1.jpg"}, {"bytes": jpeg, "path": "/elsewhere/x.jpg"}]
    source = source_of(write(folder / "t.parquet", [{"photo": cell, "caption": "c"} for cell in cells]))
    assert [sample.image for sample in source] == [
        ImageRef(str(folder / "1.jpg")),
        ImageRef(str(folder / "t.parquet"), offset=1, column="photo"),
    ]
    outside = write(folder / "u.parquet", [{"image": {"bytes": None, "path": "/etc/passwd"}, "caption": "c"}])
    with pytest.raises(UsageError, match="lies outside"):
        list(source_of(outside))


def test_random_cells_of_many_row_groups(tmp_path: Path) -> None:
    table = pa.table({"image": [b"%03d" % i for i in range(100)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=7)
    for row in (0, 99, 6, 7, 50, 3, 98):
        assert read_bytes(ImageRef(str(tmp_path / "t.parquet"), row, column="image")) == b"%03d" % row
    cells = ParquetCells(str(tmp_path / "t.parquet"))
    for row in range(100):
        cells.cell(row, "image")
    assert len(cells._groups._files) == 2


def test_few_tables_stay_open(tmp_path: Path) -> None:
    tables = KeptByThread(open_cells, limit=2)
    for i in range(4):
        pq.write_table(pa.table({"a": [i]}), tmp_path / f"{i}.parquet")
        assert tables.get(str(tmp_path / f"{i}.parquet")).cell(0, "a") == i
    assert list(tables._files) == [str(tmp_path / f"{i}.parquet") for i in (2, 3)]
    held = tables.get(str(tmp_path / "3.parquet"))
    with ThreadPoolExecutor(1) as other:
        assert other.submit(tables.get, str(tmp_path / "3.parquet")).result() is not held
    tables._pid -= 1  # as a forked child sees it
    assert tables.get(str(tmp_path / "3.parquet")) is not held


def test_cells_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [b"x"], "n": [1]}), path)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    for ref, cause in {
        ImageRef(str(path), 1, column="image"): "truncated file",
        ImageRef(str(path), 0, column="other"): "unreadable file",
        ImageRef(str(path), 0, column="n"): "no image",
        ImageRef(str(tmp_path / "gone.parquet"), 0, column="image"): "missing file",
        ImageRef(str(tmp_path / "broken.parquet"), 0, column="image"): "unreadable file",
    }.items():
        with pytest.raises(Exception) as caught:
            read_bytes(ref)
        assert (type(caught.value).__name__, caught.value.cause) == ("BadImage", cause)  # type: ignore[attr-defined]


def test_a_damaged_parquet_file_is_one_line(folder: Path, source_of: Open) -> None:
    data = write(folder / "t.parquet", ROWS * 50).read_bytes()
    for cut in (0, 3, 100, len(data) - 1):
        (folder / "cut.parquet").write_bytes(data[:cut])
        with pytest.raises(SourceError, match=r"cut\.parquet is damaged or no parquet file") as caught:
            source_of(folder / "cut.parquet")
        assert "\n" not in str(caught.value)
    (folder / "cut.parquet").write_bytes(data[:4] + b"\xff" * 200 + data[204:])
    with pytest.raises(SourceError, match=r"cut\.parquet is damaged"):
        list(source_of(folder / "cut.parquet"))


def test_captions_alone_are_enough_without_images(tmp_path: Path, source_of: Open) -> None:
    rows = [{"short_caption": "a", "long_caption": "b"}, {"short_caption": "c", "long_caption": ""}]
    samples = list(source_of(write(tmp_path / "t.csv", rows), images=False))
    assert [(s.id, dict(s.captions)) for s in samples] == [
        ("0", {"short": ("a",), "long": ("b",)}),
        ("1", {"short": ("c",)}),
    ]
    rows = [
        {"image": "gone.jpg", "caption": "a"},
        {"image": "/far/x.jpg", "caption": "b"},
        {"image": "gone.jpg", "caption": "c"},
    ]
    source = source_of(write(tmp_path / "u.csv", rows), images=False)
    assert [(s.id, s.captions["raw"], s.image.path) for s in source] == [
        ("/far/x.jpg", ("b",), ""),
        ("gone.jpg", ("a", "c"), ""),
    ]


def test_embedded_images_are_not_read_when_not_needed(tmp_path: Path, source_of: Open) -> None:
    table = write(tmp_path / "t.parquet", [{"image": b"<html>", "caption": "a"}, {"image": None, "caption": "b"}])
    assert [s.captions["raw"] for s in source_of(table, images=False)] == [("a",), ("b",)]


def test_a_table_behind_a_url(folder: Path, source_of: Open) -> None:
    for ending in ("csv", "jsonl", "parquet"):
        write(folder / f"t.{ending}", ROWS)
        samples = list(source_of(f"file://{folder}/t.{ending}"))
        assert samples[3].image == ImageRef(f"file://{folder}/3.jpg")
        assert load_image(samples[3].image).size == (12, 8)
    write(folder / "u.csv", [{"image": "../x.jpg", "caption": "a"}])
    with pytest.raises(UsageError, match="lies outside"):
        source_of(f"file://{folder}/u.csv")


def test_images_outside_the_folder_among_others_are_bad_samples(folder: Path, source_of: Open) -> None:
    names = ["../x.jpg", "0.jpg", "/etc/passwd", "1.jpg"]
    table = write(folder / "t.csv", [{"image": name, "caption": f"c{i}"} for i, name in enumerate(names)])
    source = source_of(table)
    assert [sample.id for sample in source] == ["0.jpg", "1.jpg"]
    assert source.bad.num_bad == 2
    ((cause, count),) = source.bad.counts.items()
    assert count == 2 and cause == "outside the table's folder"
    assert "image '../x.jpg' lies outside the table's folder" in source.bad.examples[cause][0]
    with pytest.raises(TooManyBadSamples, match=r"2 of 4 samples are bad.*add allow_outside=True"):
        list(source_of(table, max_bad_fraction=0.1))


def test_all_images_outside_the_folder_are_that_error_however_many(folder: Path, source_of: Open) -> None:
    rows = [{"image": f"../{i}.jpg", "caption": "x"} for i in range(100)]
    with pytest.raises(UsageError, match=r"image '\.\./0\.jpg' lies outside .* add allow_outside=True"):
        source_of(write(folder / "t.csv", rows))
    source = source_of(write(folder / "t.csv", [*rows, {"image": "0.jpg", "caption": "x"}]))
    assert len(list(source)) == 1 and source.bad.num_bad == 100


def test_more_embedded_images_than_are_read_at_once(tmp_path: Path, source_of: Open, make_image: Any) -> None:
    """150 in batches of 64, across row groups of 40: each row has its own image."""
    rows = [{"image": make_image((i + 3, 4)), "caption": f"c{i}"} for i in range(150)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=40)
    samples = list(source_of(tmp_path / "t.parquet"))
    assert [sample.captions["raw"] for sample in samples] == [(f"c{i}",) for i in range(150)]
    assert [sample.image.offset for sample in samples] == list(range(150))
    assert [load_image(samples[i].image).width for i in (0, 39, 40, 63, 64, 149)] == [3, 42, 43, 66, 67, 152]
