"""Captions: true of their scene, of the promised length, and in the words that their kind may use."""

from __future__ import annotations

import re
from itertools import islice
from random import Random

import pytest

from demo import words
from demo.grammar import Claim, Voice, draw_claim, relation, short_english, short_spanish
from demo.scene import Scene, Thing, draw_scenes
from demo.write import PER_KIND, TEST_KINDS, captioned

STAR = Thing("star", "red", "large", "solid", 0, 0)
MOON = Thing("crescent", "blue", "small", "hollow", 0, 2)
SCENE = Scene((STAR, MOON), "black", "dotted")


def words_of(caption: str) -> list[str]:
    return re.findall(r"\w+", caption)


def test_relations_by_hand() -> None:
    assert relation(STAR, MOON) == "left" and relation(MOON, STAR) == "right"
    below = Thing("star", "red", "large", "solid", 3, 2)
    assert relation(MOON, below) == "above" and relation(below, MOON) == "below"


def test_a_claim_by_hand() -> None:
    claim = Claim({"colour": "red", "shape": "star"}, {"size": "small", "shape": "crescent"}, {}, "left")
    assert claim.holds(SCENE)
    assert not Claim(claim.one, claim.other, {}, "right").holds(SCENE)
    assert not Claim({"colour": "blue", "shape": "star"}, claim.other, {}, "left").holds(SCENE)
    assert Claim(claim.one, claim.other, {"ground": "black"}, "").holds(SCENE)
    assert not Claim(claim.one, claim.other, {"ground": "teal"}, "").holds(SCENE)


def test_one_thing_is_not_two() -> None:
    same = {"colour": "red", "shape": "star"}
    assert not Claim(same, same, {}, "").holds(SCENE)


def test_drawn_claims_hold() -> None:
    random = Random(0)
    for scene in islice(draw_scenes("train", seed=1), 300):
        assert draw_claim(scene, random).holds(scene)


def test_spanish_agrees_in_gender() -> None:
    claim = Claim({"colour": "red", "shape": "star"}, {"colour": "red", "shape": "circle"}, {"ground": "black"}, "")
    text = short_spanish(claim, Voice(Random(0)))
    assert "una estrella roja" in text and "un círculo rojo" in text and text.endswith("negro")


def test_short_captions_have_6_to_15_words_and_long_ones_60_to_140() -> None:
    for sample in captioned("test", 400, seed=0, kinds=TEST_KINDS):
        for kind, (low, high) in {"short": (6, 15), "long": (60, 140), "unseen": (6, 18), "es": (6, 18)}.items():
            for caption in sample.captions[kind]:
                assert low <= len(words_of(caption)) <= high, caption


def test_long_captions_tell_every_thing_whole() -> None:
    for sample in captioned("test", 100, seed=0, kinds=("long",)):
        for caption in sample.captions["long"]:
            for thing in sample.scene.things:
                for concept in thing.key:
                    assert set(words.english(concept)[0]) & set(words_of(caption)), (concept, caption)


def test_each_image_has_two_captions_of_each_kind() -> None:
    for sample in captioned("val", 50, seed=0, kinds=TEST_KINDS):
        assert {kind: len(set(texts)) for kind, texts in sample.captions.items()} == dict.fromkeys(TEST_KINDS, PER_KIND)


@pytest.fixture(scope="module")
def vocabulary() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {kind: set() for kind in TEST_KINDS}
    for sample in captioned("train", 1500, seed=0, kinds=TEST_KINDS):
        for kind, texts in sample.captions.items():
            found[kind].update(word for text in texts for word in words_of(text))
    return found


def test_unseen_words_never_come_with_a_training_image(vocabulary: dict[str, set[str]]) -> None:
    trained = vocabulary["short"] | vocabulary["long"]
    for concept in words.ENGLISH:
        seen, unseen = words.english(concept)
        assert unseen and not set(unseen) & trained
        assert set(seen) <= trained
        assert not set(seen) & vocabulary["unseen"]
        assert set(unseen) <= vocabulary["unseen"]


def test_foreign_words_never_come_with_a_training_image(vocabulary: dict[str, set[str]]) -> None:
    trained = vocabulary["short"] | vocabulary["long"]
    for language in (words.SPANISH, words.CHINESE):
        assert not {word for entry in language.values() for word in entry.split()} & trained


def test_a_voice_has_only_its_words() -> None:
    claim = Claim({"colour": "red", "shape": "star"}, {"colour": "blue", "shape": "circle"}, {"ground": "black"}, "")
    for _ in range(20):
        text = short_english(claim, Voice(Random(_), seen=False, unseen=True))
        assert {"crimson", "asterisk", "cobalt", "roundel", "ebony"} <= set(text.split())
