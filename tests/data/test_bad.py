"""Counting what was wrong, and when that stops a run."""

from __future__ import annotations

import json
import pickle

import pytest

from llm2clip.data.bad import BadImage, BadSamples
from llm2clip.errors import TooManyBadSamples


def test_counts_by_cause_and_keeps_the_first_examples() -> None:
    bad = BadSamples(0.05)
    for i in range(7):
        bad.add(f"id{i}", "missing file", f"/x/{i}.jpg")
    bad.note("id9", "empty caption", "long")
    assert bad.num_bad == 7
    assert bad.counts == {"missing file": 7, "empty caption": 1}
    assert bad.examples["missing file"] == [f"id{i}: /x/{i}.jpg" for i in range(5)]


def test_merge_adds_counts_also_from_json() -> None:
    first, second = BadSamples(0.1), BadSamples(0.1)
    first.add("a", "missing file")
    second.add("b", "missing file")
    second.add("c", "not an image", "c.jpg")
    first.merge(json.loads(json.dumps(second.to_json())))
    assert first.to_json() == {
        "num_bad": 3,
        "counts": {"missing file": 2, "not an image": 1},
        "examples": {"missing file": ["a", "b"], "not an image": ["c: c.jpg"]},
    }


def test_more_than_the_share_stops_with_one_line() -> None:
    bad = BadSamples(0.05)
    for i in range(6):
        bad.add(f"id{i}", "truncated image", "cut.jpg")
    bad.check(120)
    with pytest.raises(TooManyBadSamples) as caught:
        bad.check(100)
    assert str(caught.value) == (
        "6 of 100 samples are bad, above max_bad_fraction 0.05: 6 truncated image; "
        "for example truncated image: id0: cut.jpg"
    )


def test_before_the_end_few_samples_prove_nothing() -> None:
    bad = BadSamples(0.05)
    for i in range(900):
        bad.add(str(i), "missing file")
    bad.check(999, final=False)
    with pytest.raises(TooManyBadSamples):
        bad.check(1000, final=False)


def test_a_limit_of_zero_allows_none_and_of_one_all() -> None:
    strict, lax = BadSamples(0.0), BadSamples(1.0)
    strict.check(5)
    strict.add("a", "missing file")
    lax.add("a", "missing file")
    lax.check(1)
    with pytest.raises(TooManyBadSamples):
        strict.check(5000)


def test_bad_image_survives_the_way_back_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(BadImage("missing file", "a.jpg")))
    assert (error.cause, error.detail, str(error)) == ("missing file", "a.jpg", "missing file: a.jpg")


def test_merged_examples_stay_few() -> None:
    first, second = BadSamples(0.1, quiet=True), BadSamples(0.1, quiet=True)
    for i in range(3):
        first.add(f"a{i}", "missing file")
    for i in range(4):
        second.add(f"b{i}", "missing file")
    first.merge(second)
    first.merge(second)
    assert (first.num_bad, first.counts) == (11, {"missing file": 11})
    assert first.examples == {"missing file": ["a0", "a1", "a2", "b0", "b1"]}


def test_the_commonest_cause_comes_first() -> None:
    bad = BadSamples(0.0, quiet=True)
    for cause, number in (("rare", 1), ("common", 3), ("usual", 2)):
        for i in range(number):
            bad.add(f"{cause}{i}", cause, "x")
    with pytest.raises(TooManyBadSamples, match="3 common, 2 usual, 1 rare; for example common: common0: x"):
        bad.check(10)
