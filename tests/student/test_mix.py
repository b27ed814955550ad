"""Which caption is taken of a sample."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from llm2clip.student.mix import choose_captions

KINDS = [0, 1, 1, 2]


def test_by_hand() -> None:
    weights = [0.25, 0.5, 0.25]
    assert choose_captions(KINDS, weights, [0.0, 0.9]) == [0]
    assert choose_captions(KINDS, weights, [0.26, 0.49]) == [1]
    assert choose_captions(KINDS, weights, [0.74, 0.5]) == [2]
    assert choose_captions(KINDS, weights, [0.76, 0.5]) == [3]


def test_weights_count_among_the_kinds_that_are_there() -> None:
    rng = np.random.default_rng(0)
    drawn = Counter(choose_captions([0, 2, 2], [1, 5, 3], rng.random(2).tolist())[0] for _ in range(4000))
    assert drawn[0] / 4000 == pytest.approx(0.25, abs=0.03)
    assert drawn[1] / 4000 == pytest.approx(0.375, abs=0.03)


def test_a_kind_without_weight_is_never_taken() -> None:
    assert choose_captions([1, 1], [1, 0], [0.5, 0.5]) == []
    assert {choose_captions(KINDS, [0, 0, 1], [draw, draw])[0] for draw in (0.0, 0.5, 0.999)} == {3}


def test_none_twice_before_all_were_taken() -> None:
    draws = np.random.default_rng(0).random((200, 12)).tolist()
    for chosen in (choose_captions(KINDS, [1, 1, 1], row) for row in draws):
        assert sorted(chosen[:4]) == [0, 1, 2, 3] and len(set(chosen[4:])) == 2
