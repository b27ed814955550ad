"""Captions and triplets on disk: what is kept, and one clear line for a bad mixture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from llm2clip.data.bad import BadSamples
from llm2clip.data.sample import ImageRef, Sample
from llm2clip.errors import LLM2CLIPError, SourceError, TooManyBadSamples, UsageError
from llm2clip.teacher.data import share_of_negatives, store_captions, store_triplets


def sample(i: int, **captions: tuple[str, ...]) -> Sample:
    return Sample(id=str(i), image=ImageRef(f"/{i}.jpg"), captions=captions)


class Samples(list):
    """Stands for a `Source`."""

    fingerprint = "of these"


def kept(path: Path, samples: Iterable[Sample], **options: Any) -> Any:
    """The rows that are stored of the samples."""
    return store_captions(path, Samples(samples), **options)[0]


def triplets(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_images_with_two_captions_are_kept_in_order(tmp_path):
    samples = [
        sample(0, short=("a",), long=("b", "c")),
        sample(1, short=("alone",)),
        sample(2, short=("same", "same")),
        sample(3, zh=("红色", "猫")),
    ]
    rows = kept(tmp_path / "a", samples, kinds=None, same=False, bad=BadSamples(0.5))
    assert [row["texts"] for row in rows] == [["a", "b", "c"], ["红色", "猫"]]
    assert rows[0]["kinds"] == ["short", "long", "long"]
    again = kept(tmp_path / "a", iter(()), kinds=None, same=False, bad=BadSamples(0.5))  # read back
    assert len(again) == 2
    bad = BadSamples(0.5)
    _, facts = store_captions(tmp_path / "facts", Samples(samples), kinds=None, same=False, bad=bad)
    assert facts == {"source_fingerprint": "of these", "bad_samples": bad.to_json()}
    one = kept(tmp_path / "b", samples, kinds=None, same=True, bad=BadSamples(0.5))
    assert len(one) == 4
    some = kept(tmp_path / "c", samples, kinds={("long", "short"): 1.0}, same=False, bad=BadSamples(0.5))
    assert len(some) == 1


def test_many_rows_cross_the_chunks(tmp_path):
    samples = [sample(i, short=(f"s{i}", f"t{i}")) for i in range(2500)]
    rows = kept(tmp_path / "a", samples, kinds=None, same=False, bad=BadSamples(0.5))
    assert len(rows) == 2500 and rows[1999]["texts"] == ["s1999", "t1999"]


def test_no_pairs_at_all_is_an_error_that_says_what_to_type(tmp_path):
    with pytest.raises(
        SourceError, match=r"two different captions of the kinds long\+short; .*captions={'KIND': 'COLUMN'}"
    ):
        kept(tmp_path / "a", [sample(0, raw=("a", "b"))], kinds={("long", "short"): 1}, same=False, bad=BadSamples(0.5))
    with pytest.raises(SourceError, match=r"are raw; .*, or positives='same' attention_dropout=0.3 for one each$"):
        kept(tmp_path / "b", [sample(0, raw=("a",))], kinds=None, same=False, bad=BadSamples(0.5))


def test_a_book_is_no_caption(tmp_path):
    bad = BadSamples(0.5)
    samples = [sample(0, short=("word " * 100_000, "a", "b"))]
    rows = kept(tmp_path / "a", samples, kinds=None, same=False, bad=bad)
    assert rows[0]["texts"] == ["a", "b"] and bad.counts == {"caption too long": 1}


def test_triplets_and_their_instruction(tmp_path):
    rows = [{"query": "q", "positive": "p", "negative": "n", "instruction": "Find it."}] * 3
    stored, facts = store_triplets(tmp_path / "s", triplets(tmp_path / "x.jsonl", rows), bad=BadSamples(0))
    assert facts["instruction"] == "Find it." and stored[0] == {"query": "q", "positive": "p", "negative": "n"}
    assert share_of_negatives(stored) == 1
    rows = [{"query": " q\n", "positive": ["p", "p2"]}, {"query": "q", "positive": "p", "negative": "n"}]
    stored, facts = store_triplets(tmp_path / "t", triplets(tmp_path / "y.jsonl", rows), bad=BadSamples(0))
    assert facts["instruction"] == "" and stored[0]["positive"] == "p" and stored[0]["query"] == "q"
    assert share_of_negatives(stored) == 0.5


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ([], SourceError, "holds no text"),
        (
            [{"sentence": "q", "label": 1}],
            SourceError,
            "needs the keys query and positive.*it has sentence, label",
        ),
        ([["q", "p"]], SourceError, "it has list"),
        ([{"query": "q", "positive": "p", "negative": "p"}], TooManyBadSamples, "negative equals positive"),
        ([{"query": "q", "positive": "a p", "negative": "A p."}], TooManyBadSamples, "negative equals positive"),
        ([{"query": "q", "positive": 3}], TooManyBadSamples, "no text in query or positive"),
        ([{"query": " ", "positive": "p"}], TooManyBadSamples, "no text in query or positive"),
        ([{"query": "q", "positive": "p", "negative": 5}], TooManyBadSamples, "negative is no text"),
        ([{"query": "q " * 100_000, "positive": "p"}], TooManyBadSamples, "text too long"),
        (
            [{"query": "q", "positive": "p", "instruction": w} for w in ("one", "two")],
            UsageError,
            "give each task its own file",
        ),
    ],
)
def test_bad_triplets_end_in_one_line(rows, error, words, tmp_path):
    with pytest.raises(error, match=words) as caught:
        store_triplets(tmp_path / "s", triplets(tmp_path / "bad.jsonl", rows), bad=BadSamples(0.05))
    assert isinstance(caught.value, LLM2CLIPError) and "\n" not in str(caught.value) and "bad" in str(caught.value)


def test_a_few_bad_triplets_are_skipped_and_counted(tmp_path):
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(30)] + [{"query": "", "positive": "p"}]
    bad = BadSamples(0.05)
    stored, _ = store_triplets(tmp_path / "s", triplets(tmp_path / "x.jsonl", rows), bad=bad)
    assert len(stored) == 30 and bad.num_bad == 1


def test_a_byte_order_mark_is_no_matter(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"query": "q", "positive": "p"}\n', encoding="utf-8-sig")
    assert len(store_triplets(tmp_path / "s", tmp_path / "x.jsonl", bad=BadSamples(0))[0]) == 1


def test_captions_that_are_all_too_long_are_said_to_be(tmp_path):
    samples = [sample(i, short=("a",), long=("word " * 100_000,)) for i in range(3)]
    with pytest.raises(TooManyBadSamples, match=r"3 of 3 .*3 caption too long.*500,000 characters"):
        kept(tmp_path / "a", samples, kinds=None, same=False, bad=BadSamples(0.5))


def test_file_names_for_captions_mean_mixed_up_columns(tmp_path):
    samples = [sample(i, short=(f"images/{i}.JPG",), long=(f"a red disc {i}",)) for i in range(30)]
    with pytest.raises(TooManyBadSamples, match=r"30 of 30 .*30 caption is a file name.*images/0.JPG"):
        kept(tmp_path / "a", samples, kinds=None, same=False, bad=BadSamples(0.05))
    assert not (tmp_path / "a").exists()
    bad = BadSamples(0.05)
    samples = [*samples[:1], *(sample(i, short=(f"disc {i}.jpg",), long=(f"no.{i} in red.png !",)) for i in range(30))]
    assert len(kept(tmp_path / "a", samples, kinds=None, same=False, bad=bad)) == 30
    assert bad.num_bad == 1


def test_no_json_and_no_file_end_in_one_line(tmp_path):
    (tmp_path / "x.jsonl").write_text("query,positive\nq,p\n")
    with pytest.raises(SourceError, match="line 1 is no JSON"):
        store_triplets(tmp_path / "s", tmp_path / "x.jsonl", bad=BadSamples(0))
    with pytest.raises(SourceError, match="cannot be read"):
        store_triplets(tmp_path / "s", tmp_path / "none.jsonl", bad=BadSamples(0))
    (tmp_path / "z.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SourceError, match="cannot be read"):
        store_triplets(tmp_path / "s", tmp_path / "z.jsonl", bad=BadSamples(0))
