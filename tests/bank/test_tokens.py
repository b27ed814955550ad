"""Tokens without padding, batches by a token budget, padding on the right side."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from llm2clip.bank.encoder import TokenBlock, can_tokenise_ahead, pad, plan_batches, tokenise
from llm2clip.teacher.model import load_teacher

TEXTS = ["a red disc", "a", "two small blue discs and the dark square near the corner"]


@pytest.fixture(scope="module")
def teacher(tiny_llm):
    return load_teacher(tiny_llm, device="cpu")


def test_tokens_are_the_teachers_own(teacher) -> None:
    block = tokenise(teacher, TEXTS, None)
    own = teacher.preprocess(TEXTS)
    padded = pad(block, np.arange(3), teacher[0].tokenizer)
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(padded[name], own[name].numpy())
    assert block.lengths.tolist() == own["attention_mask"].sum(1).tolist()


def test_a_prompt_stands_before_every_text(teacher) -> None:
    block = tokenise(teacher, TEXTS, "this is ")
    own = teacher.preprocess(TEXTS, prompt="this is ")
    np.testing.assert_array_equal(pad(block, np.arange(3), teacher[0].tokenizer)["input_ids"], own["input_ids"].numpy())
    assert block.prompt_length == own["prompt_length"] == 3


def test_long_texts_are_cut_as_the_teacher_cuts_them(teacher) -> None:
    assert tokenise(teacher, ["a " * 900], None).lengths.tolist() == [teacher.max_seq_length]


def test_many_texts_are_tokenised_in_parts(teacher, monkeypatch) -> None:
    whole = tokenise(teacher, TEXTS * 3, None)
    monkeypatch.setattr("llm2clip.bank.encoder.TOKENISE_AT_ONCE", 2)
    parts = tokenise(teacher, TEXTS * 3, None)
    np.testing.assert_array_equal(whole.arrays["input_ids"], parts.arrays["input_ids"])
    np.testing.assert_array_equal(whole.start, parts.start)


def test_batches_hold_each_text_once_and_keep_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 500)
    batches = plan_batches(lengths, 1000)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert all(len(batch) * lengths[batch].max() <= 1000 for batch in batches)
    padding = sum(len(batch) * lengths[batch].max() for batch in batches) / lengths.sum() - 1
    assert padding < 0.02


def test_a_text_longer_than_the_budget_goes_alone() -> None:
    assert [batch.tolist() for batch in plan_batches(np.array([5, 50, 5]), 10)] == [[1], [0, 2]]
    assert plan_batches(np.array([], np.int64), 10) == []


@pytest.mark.parametrize(("side", "expected"), [("right", [[7, 8], [9, 0]]), ("left", [[7, 8], [0, 9]])])
def test_padding_by_hand(side: str, expected: list[list[int]]) -> None:
    block = TokenBlock({"input_ids": np.array([9, 7, 8], np.int32)}, np.array([0, 1, 3]), None)
    tokenizer = SimpleNamespace(padding_side=side, pad_token_id=0, pad_token_type_id=0)
    padded = pad(block, np.array([1, 0]), tokenizer)
    assert padded["input_ids"].tolist() == expected
    assert padded["attention_mask"].tolist() == (np.array(expected) > 0).astype(int).tolist()


def test_only_plain_transformers_are_tokenised_ahead(teacher) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = SentenceTransformer(modules=[StaticEmbedding(teacher.tokenizer, embedding_dim=8)], device="cpu")
    assert can_tokenise_ahead(teacher)
    assert not can_tokenise_ahead(static)
