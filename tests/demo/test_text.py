"""What the mini LLM reads: seeded, of its own scenes alone, in all words and languages; and its tokenizer."""

from __future__ import annotations

from itertools import islice

import pytest

from demo import text, words
from demo.scene import Scene
from demo.text import documents
from demo.tokens import make_tokenizer


def test_documents_are_a_function_of_the_seed() -> None:
    first = list(islice(documents(seed=1), 50))
    assert first == list(islice(documents(seed=1), 50)) != list(islice(documents(seed=2), 50))


def test_documents_tell_of_no_scene_of_another_split(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Scene] = []
    draw = text.draw_scenes

    def spy(split: str, *, seed: int):
        for scene in draw(split, seed=seed):
            told.append(scene)
            yield scene

    monkeypatch.setattr(text, "draw_scenes", spy)
    list(islice(documents(seed=0), 200))
    assert len(told) == 200 and all(scene.bucket < 30 for scene in told)


def test_every_word_of_every_language_occurs() -> None:
    read = " ".join(islice(documents(seed=0), 3000))
    for concept in words.ENGLISH:
        seen, unseen = words.english(concept)
        for word in (*seen, *unseen, *words.SPANISH[concept].split(), words.CHINESE[concept]):
            assert word in read, word


def test_the_tokenizer_knows_every_word() -> None:
    tokenizer = make_tokenizer()
    unknown = tokenizer.unk_token_id
    for document in islice(documents(seed=9), 300):
        assert unknown not in tokenizer(document)["input_ids"], document
    assert tokenizer("a red disc")["input_ids"][0] == tokenizer.bos_token_id
    assert make_tokenizer(closing=True)("a red disc")["input_ids"][-1] == tokenizer.eos_token_id
