"""Banks with caption views: the teacher's vectors of texts cut by hand, gone on with, and drawn from in training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm2clip.bank.build import build_bank
from llm2clip.bank.config import BankAddConfig, BankConfig
from llm2clip.bank.merge import add_to_bank
from llm2clip.bank.reader import Bank
from llm2clip.bank.verify import cosines
from llm2clip.errors import UsageError
from llm2clip.student.mix import choose_captions, kind_weights, wanted_kinds
from llm2clip.teacher.model import load_teacher

from ..forking import end_of, fork
from .conftest import write_image

VIEWS = {"long": "rest,sample"}
LONG = {
    "0.jpg": ("A red disc. ", "It is small. ", "The left is dark."),
    "1.jpg": ("One blue square.",),
    "2.jpg": ("两个圆。", "背景是黑色的。"),
}
HELD = {  # sample, kind -> its captions, cut by hand
    (0, "short"): ["a disc 0.jpg"],
    (0, "long"): ["A red disc. It is small. The left is dark."],
    (0, "long-rest"): ["It is small. The left is dark."],
    (0, "long-sample"): ["The left is dark."],
    (1, "long"): ["One blue square."],
    (1, "long-rest"): [],
    (1, "long-sample"): [],
    (2, "long"): ["两个圆。背景是黑色的。"],
    (2, "long-rest"): ["背景是黑色的。"],
    (2, "long-sample"): [],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    rows = [f"{name},a disc {name},{''.join(sentences)}" for name, sentences in LONG.items()]
    (folder / "a.csv").write_text("\n".join(["image,short_caption,long_caption", *rows]), encoding="utf-8")
    for name in LONG:
        write_image(folder / name)
    return folder / "a.csv"


@pytest.fixture(scope="module")
def viewed(data: Path, build) -> Bank:
    return build(data, data.parent / "bank", views=VIEWS, shard_rows=2, dtype="float32")


def test_it_holds_the_teachers_vectors_of_exactly_those_texts(viewed: Bank, tiny_llm: Path) -> None:
    held = {key: [viewed.text(row) for row in viewed.rows(*key)] for key in HELD}
    assert held == HELD
    assert viewed.kinds == ["short", "long", "long-rest", "long-sample"]
    texts = sorted({text for found in HELD.values() for text in found} | {"a disc 1.jpg", "a disc 2.jpg"})
    assert sorted(viewed.text(row) for row in range(viewed.num_rows)) == texts
    teacher = load_teacher(tiny_llm, device="cpu")
    for key, found in HELD.items():
        if found:
            vectors = viewed.vectors(viewed.rows(*key)).astype(np.float32)
            assert cosines(vectors, teacher.encode(found)).min() > 0.99999


def test_its_settings_and_fingerprint_know_them(viewed: Bank, data: Path, build, tmp_path: Path) -> None:
    plain, other = build(data, tmp_path / "plain"), build(data, tmp_path / "other", views={"long": "rest"})
    assert viewed.manifest["config"]["views"] == VIEWS and plain.manifest["config"]["views"] == {}
    assert len({bank.fingerprint for bank in (viewed, plain, other)}) == 3
    assert len({bank.manifest["source_fingerprint"] for bank in (viewed, plain, other)}) == 3
    with pytest.raises(UsageError, match=r"views was {}, now {'long': 'rest'}"):
        build(data, tmp_path / "plain", views={"long": "rest"})


def test_a_lost_shard_and_a_lost_table_come_back_to_the_byte(viewed: Bank, data, build, tmp_path, files_of) -> None:
    same = {"views": VIEWS, "shard_rows": 2, "dtype": "float32"}
    build(data, tmp_path / "bank", **same)
    assert files_of(tmp_path / "bank") == files_of(viewed.folder)
    for lost in ("vectors/00001.json", "table/samples.arrow"):
        (tmp_path / "bank" / lost).unlink()
        build(data, tmp_path / "bank", **same)
        assert files_of(tmp_path / "bank") == files_of(viewed.folder), lost


def test_two_processes_make_the_same(viewed: Bank, data: Path, tiny_llm: Path, tmp_path: Path, files_of) -> None:
    settings = {"precision": "fp32", "device": "cpu", "shard_rows": 2, "dtype": "float32", "views": VIEWS}
    config = BankConfig(data=(str(data),), teacher=str(tiny_llm), out=tmp_path / "bank", **settings)
    children = [fork(lambda: build_bank(config)) for _ in range(2)]
    assert [end_of(child) for child in children] == [0, 0]
    assert files_of(tmp_path / "bank") == files_of(viewed.folder)


def test_captions_without_images_have_views_too(build, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("A dog. It is old.\nA cat.\n")
    bank = build(tmp_path / "words.txt", tmp_path / "bank", text_only=True, views={"raw": "rest"})
    assert {kind: counts["captions"] for kind, counts in bank.manifest["kinds"].items()} == {"raw": 2, "raw-rest": 1}
    assert [bank.text(row) for row in bank.rows(0, "raw-rest")] == ["It is old."]


def test_views_are_added_to_a_bank_that_has_none(viewed: Bank, data: Path, build, tmp_path: Path, encoded) -> None:
    plain = build(data, tmp_path / "plain", dtype="float32")
    encoded.clear()
    grown = Bank.open(
        add_to_bank(
            BankAddConfig(bank=plain.folder, data=(str(data),), out=tmp_path / "grown", views=VIEWS, device="cpu")
        )
    )
    assert sum(encoded) == viewed.num_rows - plain.num_rows == 3
    assert {key: [grown.text(row) for row in grown.rows(*key)] for key in HELD} == HELD


def test_training_mixes_them_like_any_other_kind(viewed: Bank) -> None:
    mix = {"short": 1.0, "long-rest": 3.0}
    assert wanted_kinds([viewed], mix) == ["short", "long-rest"]
    weights = kind_weights(viewed, mix)
    assert weights == [1.0, 0.0, 3.0, 0.0]
    start, end = viewed.table.caption_start[:2]
    kinds = viewed.table.caption_kind[start:end].tolist()
    for draw, text in ((0.2, "a disc 0.jpg"), (0.3, "It is small. The left is dark.")):
        (place,) = choose_captions(kinds, weights, [draw, 0.0])
        assert viewed.text(viewed.table.caption_row[start + place]) == text
