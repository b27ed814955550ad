"""The collect pass: columns, texts once each, rows in the order of first appearance."""

from __future__ import annotations

import numpy as np
import pytest

from llm2clip.bank import collect as module
from llm2clip.bank.collect import Intake, collect
from llm2clip.bank.table import Table
from llm2clip.data.bad import BadSamples
from llm2clip.data.sample import PictureRef, Sample
from llm2clip.errors import SourceError, TooManyBadSamples, UsageError

SAMPLES = [
    Sample("a", PictureRef("/tars/0.tar", 512, 100), {"short": ("a disc",), "long": ("a red disc 🙂", "a disc")}),
    Sample("b", PictureRef("/tars/0.tar", 1024, 90), {"long": ("圆",)}),
    Sample("c", PictureRef("/t.parquet", 3, -1, "image"), {"short": ("a disc", "two discs")}),
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
    assert np.load(tmp_path / "table" / "picture_path.npy").tolist() == [0, 0, 1]


def test_chunks_make_no_difference(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [Sample(str(i), PictureRef(f"{i % 7}.tar", i), {"raw": (f"caption {i % 23}", str(i))}) for i in range(99)]
    facts = []
    for chunk, name in ((5, "small"), (10_000, "large")):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(module, "CHUNK_CAPTIONS", chunk)
        facts.append(collect(intake(samples), tmp_path / name))
    assert facts[0] == facts[1]


def test_a_long_list_of_paths_is_forgotten_now_and_then(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KNOWN_PATHS", 2)
    samples = [Sample(str(i), PictureRef(f"{i % 3}.jpg"), {"raw": ("x",)}) for i in range(8)]
    collect(intake(samples), tmp_path)
    table = Table(tmp_path)
    assert [table.picture(i).path for i in range(8)] == [f"{i % 3}.jpg" for i in range(8)]


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
    sample = Sample("a", PictureRef("a.jpg"), {f"kind{i}": ("x",) for i in range(257)})
    with pytest.raises(UsageError, match="more than 256 kinds"):
        collect(intake([sample]), tmp_path)


def test_an_unusual_file_name_survives(tmp_path) -> None:
    path = b"/pictures/\xff\xe9.jpg".decode("utf-8", "surrogateescape")
    collect(intake([Sample("x", PictureRef(path), {"raw": ("x",)})]), tmp_path)
    assert Table(tmp_path).picture(0).path == path


def test_a_sample_without_captions_keeps_its_place(tmp_path) -> None:
    samples = [SAMPLES[0], Sample("empty", PictureRef("e.jpg"), {}), SAMPLES[1]]
    collect(intake(samples), tmp_path)
    table = Table(tmp_path)
    assert [len(table.rows(i)) for i in range(3)] == [3, 0, 1]
