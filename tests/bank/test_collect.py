"""The collect pass: columns, texts once each, rows in the order of first appearance."""

from __future__ import annotations

import hashlib
import tracemalloc

import numpy as np
import pytest

from llm2clip.bank import collect as module
from llm2clip.bank.collect import Intake, collect
from llm2clip.bank.reader import SCHEMAS, TABLE, Table, read_arrow
from llm2clip.data.bad import BadSamples
from llm2clip.data.sample import ImageRef, Sample
from llm2clip.errors import SourceError, TooManyBadSamples, UsageError

SAMPLES = [
    Sample("a", ImageRef("/tars/0.tar", 512, 100), {"short": ("a disc",), "long": ("a red disc 🙂", "a disc")}),
    Sample("b", ImageRef("/tars/0.tar", 1024, 90), {"long": ("圆",)}),
    Sample("c", ImageRef("/t.parquet", 3, -1, "image"), {"short": ("a disc", "two discs")}),
]


def intake(samples: list[Sample], bad: BadSamples | None = None) -> Intake:
    return Intake(samples, "source", bad or BadSamples(0.05))


def test_by_hand(tmp_path) -> None:
    facts = collect(intake(SAMPLES), tmp_path)
    assert facts["kinds"] == {"short": {"samples": 2, "captions": 3}, "long": {"samples": 2, "captions": 3}}
    assert (facts["num_samples"], facts["num_captions"], facts["num_rows"]) == (3, 6, 4)
    table = Table(tmp_path)
    assert [table.text(row) for row in range(4)] == ["a disc", "a red disc 🙂", "圆", "two discs"]
    assert [table.rows(i).tolist() for i in range(3)] == [[0, 1, 0], [2], [0, 3]]
    assert table.rows(0, "long").tolist() == [1, 0]
    assert table.rows(1, "short").tolist() == []
    assert [table.sample(i) for i in range(3)] == SAMPLES
    assert table.image_path.tolist() == [0, 0, 1]
    assert (table.caption_start.tolist(), table.caption_kind.tolist()) == ([0, 3, 4, 6], [0, 1, 1, 1, 0, 0])
    assert [int(text) for text in table.hashes[:, 0]] == [
        hashlib.sha256(table.text(i).encode()).digest()[0] for i in range(4)
    ]


def test_chunks_make_no_difference(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [Sample(str(i), ImageRef(f"{i % 7}.tar", i), {"raw": (f"caption {i % 23}", str(i))}) for i in range(99)]
    facts = []
    for chunk, name in ((5, "small"), (10_000, "large")):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(module, "CHUNK_CAPTIONS", chunk)
        facts.append(collect(intake(samples), tmp_path / name))
    assert facts[0] == facts[1]


def test_a_long_list_of_paths_is_forgotten_now_and_then(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KNOWN_PATHS", 2)
    samples = [Sample(str(i), ImageRef(f"{i % 3}.jpg"), {"raw": ("x",)}) for i in range(8)]
    collect(intake(samples), tmp_path)
    table = Table(tmp_path)
    assert [table.image(i).path for i in range(8)] == [f"{i % 3}.jpg" for i in range(8)]


def test_rows_of_a_base_come_first(tmp_path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    collect(intake(SAMPLES[2:]), tmp_path / "old")
    base = Table(tmp_path / "old")
    collect(Intake(SAMPLES, "source", BadSamples(0), base=base), tmp_path / "new")
    table = Table(tmp_path / "new")
    assert [table.text(row) for row in range(4)] == ["a disc", "two discs", "a red disc 🙂", "圆"]
    assert [table.sample(i) for i in range(3)] == SAMPLES


def test_no_sample_is_an_error_and_leaves_nothing(tmp_path) -> None:
    with pytest.raises(SourceError, match="no sample with a caption"):
        collect(intake([]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_too_many_bad_samples(tmp_path) -> None:
    bad = BadSamples(0.2)
    bad.add("x", "empty caption")
    with pytest.raises(TooManyBadSamples, match="1 of 4 samples are bad"):
        collect(intake(SAMPLES, bad), tmp_path)


def test_bad_samples_are_in_the_facts(tmp_path) -> None:
    bad = BadSamples(0.5)
    bad.add("x", "empty caption")
    assert collect(intake(SAMPLES, bad), tmp_path)["bad"]["counts"] == {"empty caption": 1}


def test_too_many_kinds(tmp_path) -> None:
    sample = Sample("a", ImageRef("a.jpg"), {f"kind{i}": ("x",) for i in range(257)})
    with pytest.raises(UsageError, match="more than 256 kinds"):
        collect(intake([sample]), tmp_path)


def test_an_unusual_file_name_survives(tmp_path) -> None:
    path = b"/images/\xff\xe9.jpg".decode("utf-8", "surrogateescape")
    collect(intake([Sample("x", ImageRef(path), {"raw": ("x",)})]), tmp_path)
    assert Table(tmp_path).image(0).path == path


def test_a_sample_without_captions_keeps_its_place(tmp_path) -> None:
    samples = [SAMPLES[0], Sample("empty", ImageRef("e.jpg"), {}), SAMPLES[1]]
    collect(intake(samples), tmp_path)
    table = Table(tmp_path)
    assert [len(table.rows(i)) for i in range(3)] == [3, 0, 1]


def test_columns_are_the_files_own_memory(tmp_path) -> None:
    """Plain numpy arrays that nobody copies: what a loader process reads for each sample."""
    collect(intake(SAMPLES), tmp_path)
    table = Table(tmp_path)
    for array in (table.caption_start, table.caption_kind, table.caption_row, table.image_path, table.hashes):
        assert type(array) is np.ndarray and not array.flags.owndata and not array.flags["W"]
    assert [array.dtype for array in (table.caption_start, table.caption_kind, table.caption_row)] == [
        np.int64,
        np.uint8,
        np.int64,
    ]


@pytest.mark.parametrize("chunk", [1, 5, 10_000])
def test_a_column_is_one_array_however_it_was_filled(chunk: int, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_CAPTIONS", chunk)
    samples = [Sample(str(i), ImageRef(f"{i}.jpg", i, 2 * i), {"raw": (f"caption {i}",)}) for i in range(99)]
    collect(intake(samples), tmp_path)
    for name in SCHEMAS:
        batch = read_arrow(tmp_path, name)
        assert len(batch) == 99
        batch.validate(full=True)
    assert [Table(tmp_path).sample(i) for i in range(99)] == samples


def test_nothing_but_the_table_is_left(tmp_path) -> None:
    (tmp_path / f".{TABLE}.tmp").mkdir()
    (tmp_path / f".{TABLE}.tmp" / "of a killed run").touch()
    collect(intake(SAMPLES), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [TABLE]
    assert sorted(path.name for path in (tmp_path / TABLE).iterdir()) == ["facts.json", "samples.arrow", "texts.arrow"]


def test_files_of_the_table_are_on_the_disk_before_it_has_its_name(tmp_path, renames: dict[str, list[str]]) -> None:
    collect(intake(SAMPLES), tmp_path)
    assert renames == {"facts.json": [], TABLE: []}


def test_many_captions_take_no_more_memory_than_few(tmp_path) -> None:
    """Beside 32 bytes a distinct caption: here all are the same few, of a kilobyte each."""

    def peak(count: int) -> int:
        (tmp_path / str(count)).mkdir()
        texts = [f"{i:04d}" * 256 for i in range(64)]
        samples = (Sample(f"{i}", ImageRef("a.tar", i), {"raw": (texts[i % 64],)}) for i in range(count))
        tracemalloc.start()
        collect(intake(samples), tmp_path / str(count))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(100)
    few, many = peak(20_000), peak(60_000)
    assert many < few + 1_000_000  # as numbers alone 40,000 samples and captions are 1.9 MB, as objects of Python 20
