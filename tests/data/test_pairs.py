"""Caption pairs of one image: which there are, and which is drawn."""

from __future__ import annotations

from collections import Counter

from llm2clip.data.pairs import draw_pair, possible_pairs

CAPTIONS = {"short": ("s1", "s2"), "long": ("l1",)}


def test_all_pairs_of_different_captions() -> None:
    assert possible_pairs(CAPTIONS) == {
        ("short", "short"): [("s1", "s2")],
        ("long", "short"): [("l1", "s1"), ("l1", "s2")],
    }


def test_equal_texts_are_no_pair() -> None:
    assert possible_pairs({"raw": ("a", "a"), "short": ("a",)}) == {}
    assert draw_pair({"raw": ("a",), "short": ("a",)}, seed=0, sample_id="x") is None
    assert draw_pair({"raw": ("a",)}, seed=0, sample_id="x") is None


def test_the_draw_is_a_pure_function_of_seed_epoch_and_sample() -> None:
    draws = [[draw_pair(CAPTIONS, seed=s, sample_id=i, epoch=e) for i in "abcdefgh" for e in (0, 1)] for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_weights_choose_kinds_and_both_orders_come() -> None:
    drawn = Counter(
        draw_pair(CAPTIONS, seed=0, sample_id=str(i), weights={("long", "short"): 3.0, ("short", "short"): 1.0})
        for i in range(4000)
    )
    short = drawn["s1", "s2"] + drawn["s2", "s1"]
    assert abs(short / 4000 - 0.25) < 0.03
    assert abs((drawn["l1", "s1"] + drawn["l1", "s2"]) / (4000 - short) - 0.5) < 0.04
    only = {draw_pair(CAPTIONS, seed=0, sample_id=str(i), weights={("long", "short"): 1.0}) for i in range(50)}
    assert only == {("l1", "s1"), ("s1", "l1"), ("l1", "s2"), ("s2", "l1")}
    assert draw_pair(CAPTIONS, seed=0, sample_id="a", weights={("long", "long"): 1.0}) is None


def test_each_part_of_the_key_changes_the_draw() -> None:
    captions = {"raw": tuple(str(i) for i in range(100))}
    keys = [{"seed": s, "epoch": e, "sample_id": i} for s in (0, 1) for e in (0, 1) for i in ("a", "b")]
    assert len({draw_pair(captions, **key) for key in keys}) == 8  # type: ignore[arg-type]
