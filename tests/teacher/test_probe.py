"""The scores of an encoder on captions, by hand, and which captions are taken."""

from __future__ import annotations

import numpy as np
import pytest

from llm2clip.data.sample import ImageRef, Sample
from llm2clip.teacher.probe import first_captions, probe_captions, sampled_captions

ANGLES = {"a": 0, "b": 10, "c": 45, "d": 50, "e": 25, "f": 200}


def encode(texts):
    return np.array([[np.cos(np.radians(ANGLES[text])), np.sin(np.radians(ANGLES[text]))] for text in texts])


def test_scores_by_hand() -> None:
    """Of the second image both find each other, of the others none does."""
    scores = probe_captions(encode, [("a", "e"), ("c", "d"), ("f", "b")])
    assert scores["images"] == 3
    assert scores["cra_second"] == pytest.approx(1 / 3)  # of e, d, b: a finds b, c finds d, f finds d
    assert scores["cra_all"] == pytest.approx(2 / 6)  # a-b, e-b, c-d, d-c, f-d, b-a
    swapped = probe_captions(encode, [("e", "a"), ("c", "d"), ("b", "f")])
    assert swapped["cra_second"] == pytest.approx(1 / 3) and swapped["cra_all"] == scores["cra_all"]
    three = probe_captions(encode, [("a", "b", "e"), ("c", "d")])
    assert three["images"] == 2 and three["cra_all"] == 1


def sample(i: int, **captions: tuple[str, ...]) -> Sample:
    return Sample(id=str(i), image=ImageRef(f"/{i}.jpg"), captions=captions)


def test_the_first_images_with_two_different_captions_are_taken() -> None:
    samples = [sample(0, short=("a",), long=("b", "a")), sample(1, short=("c", "c")), sample(2, short=("d", "e", "f"))]
    assert first_captions(samples, limit=5) == [("a", "b"), ("d", "e", "f")]
    more = iter([*samples, sample(3, short=("g", "h")), sample(4, short=("i", "j"))])
    assert len(first_captions(more, limit=3)) == 3
    assert next(more).id == "4"  # nothing is read past the last one taken


def test_a_sample_of_the_stored_captions_is_drawn_from_the_seed_and_kept_in_order() -> None:
    rows = [{"texts": [f"a{i:02}", f"a{i:02}", f"b{i:02}"]} for i in range(40)]
    taken = sampled_captions(rows, limit=8, seed=0)
    assert len(taken) == 8 and all(a[1:] == b[1:] for a, b in taken) and taken == sorted(taken)
    assert taken == sampled_captions(rows, limit=8, seed=0) != sampled_captions(rows, limit=8, seed=1)
    assert len(sampled_captions(rows, limit=100, seed=0)) == 40
    assert sampled_captions([{"texts": ["a", "a"]}], limit=2, seed=0) == []
