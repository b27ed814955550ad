"""Caption views: where sentences end, what the views keep of them, and sources that give them as kinds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from llm2clip.bank.config import BankConfig
from llm2clip.data.config import SourceConfig
from llm2clip.data.source import Source
from llm2clip.data.views import add_views, rest, sample, split_sentences
from llm2clip.errors import UsageError
from llm2clip.flags import parse
from llm2clip.verbs import VERBS

Open = Callable[..., Source]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A dog. It is brown! Is it? Yes", ["A dog.", "It is brown!", "Is it?", "Yes"]),
        ("A dog.", ["A dog."]),
        ("no mark at all", ["no mark at all"]),
        ("a star . at the top : a cross .", ["a star .", "at the top : a cross ."]),
        ("¿Un perro? ¡Sí! Es marrón.", ["¿Un perro?", "¡Sí!", "Es marrón."]),
        ("一只狗。它是棕色的！是吗？是", ["一只狗。", "它是棕色的！", "是吗？", "是"]),
        ("“一只狗。”很大。 A dog. 猫。", ["“一只狗。”", "很大。", "A dog.", "猫。"]),
        ('He says "Stop." The dog stops.', ['He says "Stop."', "The dog stops."]),
        ("Two dogs... and a cat?! Yes.", ["Two dogs...", "and a cat?!", "Yes."]),
        ("A dog.\n\nIt is brown.\tAnd old.", ["A dog.", "It is brown.", "And old."]),
        ("It is 3.5 m tall. See a.jpg, v1.2 on x.com. End", ["It is 3.5 m tall.", "See a.jpg, v1.2 on x.com.", "End"]),
        ("Fruit (e.g. pears), i.e. food. It is ripe.", ["Fruit (e.g. pears), i.e. food.", "It is ripe."]),
        ("Mr. A. Dog vs. Dr. Cat. A fight.", ["Mr. A. Dog vs. Dr. Cat.", "A fight."]),
        ("El Sr. Perro, p. ej. grande. Es él.", ["El Sr. Perro, p. ej. grande.", "Es él."]),
        ("At 9 a.m. in the U.S. capital. Rain.", ["At 9 a.m. in the U.S. capital.", "Rain."]),
        ("A farm. 1. A cow. 2. A pig. ...", ["A farm.", "1. A cow.", "2. A pig. ..."]),
        ("...", ["..."]),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    found = split_sentences(text)
    assert [sentence.strip() for sentence in found] == sentences
    assert "".join(found) == text


def test_the_rest_is_all_but_the_first_sentence() -> None:
    assert rest(split_sentences("A dog. It is  brown.\nIt barks.")) == "It is  brown.\nIt barks."
    assert rest(split_sentences("一只狗。它是棕色的。很大。")) == "它是棕色的。很大。"
    assert rest(split_sentences("A dog.")) == ""


def test_a_sample_is_some_of_the_rest_in_order() -> None:
    drawn = {}
    for number in range(300):
        sentences = split_sentences(f"Dog {number}. Old. It is brown. It barks. It runs.")
        text = sample(sentences)
        kept = split_sentences(text)
        places = [[one.strip() for one in sentences].index(one.strip()) for one in kept]
        assert places == sorted(set(places)) and 1 <= len(places) <= 3 and 0 not in places
        assert sample(list(sentences)) == text
        drawn.setdefault(len(places), set()).add(tuple(places))
    assert drawn[1] == {(1,), (2,), (3,), (4,)}  # each number of sentences, and each choice of so many, comes
    assert len(drawn[2]) == 6 and len(drawn[3]) == 4


def test_how_many_are_sampled_is_even() -> None:
    tails = ("Old.", "It is brown.", "It barks.", "It runs.")
    texts = [sample(split_sentences(" ".join((f"Dog {number}.", *tails)))) for number in range(900)]
    counts = [[len(split_sentences(text)) for text in texts].count(size) for size in (1, 2, 3)]
    assert sum(counts) == 900 and all(240 < count < 360 for count in counts)


def test_too_few_sentences_have_no_sample_of_their_own() -> None:
    assert sample(["A dog. ", "It is brown."]) == sample(["A dog."]) == ""
    assert sample(["A dog. ", "Old. ", "Brown."]) in ("Old.", "Brown.")


def test_what_is_drawn_stays_the_same_for_good() -> None:
    """Banks that are built again, by whatever Python, are equal; another value here breaks those that are begun."""
    text = "a star is at the top . the star is red . the background is black . a cross is below . all is small ."
    assert sample(split_sentences(text)) == "the star is red . a cross is below . all is small ."


def test_views_are_kinds_beside_their_own() -> None:
    captions = {"long": ("A dog. It is old.", "One dog.", "The dog. It is old."), "short": ("a dog",)}
    found = add_views(captions, {"long": "rest, sample", "short": "rest", "zh": "rest"})
    assert found == {**captions, "long-rest": ("It is old.",)}
    assert add_views(captions, {}) == captions


ROWS = (
    "image,short_caption,long_caption\n"
    "a.jpg,a dog,A dog. It is old. It barks.\n"
    "b.jpg,a cat,One cat.\n"
    "a.jpg,dog,A big dog! It sleeps.\n"
    "c.jpg,a pig,\n"
)


@pytest.fixture
def table(tmp_path: Path, jpeg: bytes) -> Path:
    (tmp_path / "t.csv").write_text(ROWS)
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(jpeg + name.encode())
    return tmp_path / "t.csv"


def test_a_source_gives_views_of_all_captions_of_an_image(table: Path, source_of: Open) -> None:
    found = {sample.id: dict(sample.captions) for sample in source_of(table, views={"long": "rest"})}
    assert found["a.jpg"]["long-rest"] == ("It is old. It barks.", "It sleeps.")
    assert found["a.jpg"]["long"] == ("A dog. It is old. It barks.", "A big dog! It sleeps.")
    assert found["b.jpg"] == {"short": ("a cat",), "long": ("One cat.",)}  # one sentence: it lacks the kind
    assert found["c.jpg"] == {"short": ("a pig",)}


def test_tars_and_texts_alone_have_views_too(tmp_path: Path, jpeg: bytes, make_tar, source_of: Open) -> None:
    make_tar(tmp_path / "a.tar", {"1.jpg": jpeg, "1.json": '{"long_captions": ["A dog. Old.", "Dog."]}'})
    (tmp_path / "words.txt").write_text("A dog. It is old.\nA cat.\n")
    (tarred,) = source_of(tmp_path / "a.tar", views={"long": "rest"})
    assert tarred.captions == {"long": ("A dog. Old.", "Dog."), "long-rest": ("Old.",)}
    dog, cat = source_of(tmp_path / "words.txt", images=False, views={"raw": "rest"})
    assert dog.captions == {"raw": ("A dog. It is old.",), "raw-rest": ("It is old.",)}
    assert cat.captions == {"raw": ("A cat.",)}


def test_named_kinds_have_views(table: Path, source_of: Open) -> None:
    found = source_of(table, captions={"mine": "long_caption"}, views={"mine": "rest"})
    assert {kind for one in found for kind in one.captions} == {"mine", "mine-rest"}


def test_views_are_part_of_what_a_source_is(table: Path, source_of: Open) -> None:
    plain = source_of(table).fingerprint
    assert source_of(table, views={}).fingerprint == plain
    others = [{"long": "rest"}, {"long": "sample"}, {"long": "rest,sample"}, {"short": "rest"}]
    assert len({plain, *(source_of(table, views=views).fingerprint for views in others)}) == 5


def test_a_view_that_nothing_has_is_told(table: Path, source_of: Open, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "llm2clip"):
        list(source_of(table, views={"long": "rest", "short": "rest,sample", "zh": "rest"}))
    told = [record.getMessage() for record in caplog.records if "views" in record.getMessage()]
    assert told == [
        "views: there is no short-rest, as no caption of the kind short has sentences enough",
        "views: there is no short-sample, as no caption of the kind short has sentences enough",
        "views: there is no zh-rest, as no caption of the kind zh has sentences enough",
    ]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"views": ["long"]},
            r"^views is \['long'\]; name the views of each kind, as in views={'long': 'rest,sample'}",
        ),
        ({"views": {"long": "rset"}}, r"^views={'long': 'rset'}: view 'rset' is unknown \(did you mean 'rest'\?\)"),
        ({"views": {"long": "rest,"}}, "view '' is unknown; choose from rest, sample$"),
        (
            {"views": {"lnog": "rest"}},
            r"^views={'lnog': 'rest'}: kind of caption 'lnog' is unknown \(did you mean 'long'\?\)",
        ),
        ({"views": {"long": "rest"}, "captions": {"a": "b"}}, "kind of caption 'long' is unknown; choose from a$"),
        (
            {"views": {"long": "rest"}, "captions": {"long": "b", "long-rest": "c"}},
            r"^views={'long': 'rest'} makes long-rest, which captions names too; call that one otherwise",
        ),
    ],
)
def test_impossible_views(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        SourceConfig(data=("a.csv",), **settings)  # type: ignore[arg-type]


def test_the_flag() -> None:
    words = "--data a.csv --teacher t --out b --views long=rest,sample zh=rest".split()
    assert parse("build-bank", VERBS["build-bank"], BankConfig, words).views == {"long": "rest,sample", "zh": "rest"}
