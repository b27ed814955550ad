"""Captions longer than a text encoder reads are counted, each exactly once."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from llm2clip import EvaluateConfig, evaluate
from llm2clip.cuts import CutCounter, say_cut
from llm2clip.pipeline import Teacher
from llm2clip.teacher.model import llm_as_encoder

WORDS = [1, 6, 7, 8, 30]
"""Of captions for an encoder that reads 8 tokens: the begin token and 7 words; the last two are cut."""
CUT = [False, False, False, True, True]


@pytest.fixture(scope="module")
def encoder(tiny_llm: Path) -> SentenceTransformer:
    return llm_as_encoder(tiny_llm, max_length=8, device="cpu")


def captions(numbers: list[int]) -> list[str]:
    return [" ".join(["red"] * number) for number in numbers]


def test_a_caption_of_exactly_the_limit_is_whole(encoder: SentenceTransformer) -> None:
    counter = CutCounter(encoder)
    assert counter.limit == 8
    assert counter.cut(captions(WORDS)).tolist() == CUT
    read = np.minimum(np.array(WORDS) + 1, 8)
    assert counter.cut(captions(WORDS), read).tolist() == CUT
    assert counter.cut([]).tolist() == []


def test_the_prompt_counts(encoder: SentenceTransformer) -> None:
    assert CutCounter(encoder, "a blue disc ").cut(captions([4, 5])).tolist() == [False, True]


def test_characters_of_several_bytes(encoder: SentenceTransformer) -> None:
    """A text of few characters may be many tokens."""
    assert CutCounter(encoder).cut(["圆 圆 圆 圆 圆 圆 圆", "圆 圆 圆 圆 圆 圆 圆 圆"]).tolist() == [False, True]


def test_counting_leaves_the_tokenizer_alone(encoder: SentenceTransformer) -> None:
    before = encoder.encode(captions(WORDS))
    CutCounter(encoder).cut(captions(WORDS))
    assert encoder.tokenizer.backend_tokenizer.truncation is not None
    assert np.array_equal(encoder.encode(captions(WORDS)), before)


def test_captions_go_the_default_way_of_a_router(encoder: SentenceTransformer, tiny_llm: Path) -> None:
    longer = llm_as_encoder(tiny_llm, max_length=20, device="cpu")
    routed = SentenceTransformer(modules=[Router({"query": list(encoder), "document": list(longer)})], device="cpu")
    assert CutCounter(routed).limit == 8
    routed[0].default_route = "document"
    assert CutCounter(routed).limit == 20
    assert CutCounter(routed).cut(captions([8, 20])).tolist() == [False, True]


def test_an_encoder_without_a_limit_cuts_nothing(encoder: SentenceTransformer) -> None:
    backend = encoder.tokenizer.backend_tokenizer
    bag = SentenceTransformer(modules=[StaticEmbedding(backend, embedding_weights=torch.ones(128, 4))], device="cpu")
    counter = CutCounter(bag)
    assert counter.limit is None
    assert counter.cut(captions([500])).tolist() == [False]


def test_the_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="llm2clip"):
        say_cut(0, 10, 8)
        say_cut(0, 0, None)
        say_cut(2500, 10_000, 512)
    assert caplog.messages == [
        "2,500 of 10,000 captions (25.0%) are longer than 512 tokens: their ends are cut "
        "(a joined teacher cuts for the member that reads least)"
    ]


def test_encoding_texts_says_it_once_and_counts_on(
    encoder: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = Teacher(encoder)
    with caplog.at_level(logging.WARNING, logger="llm2clip"):
        for numbers in ([1, 7], [8, 9], [3, 10]):
            teacher.encode_text(captions(numbers))
    assert caplog.messages == ["texts longer than 8 tokens are cut; num_cut counts them"]
    assert (teacher.num_cut, teacher.context) == (3, 8)


def test_evaluate_says_it_once_with_the_share(
    encoder: SentenceTransformer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder.save_pretrained(str(tmp_path / "teacher"), create_model_card=False)
    rows = [f"{i}.jpg,{text}" for i, text in enumerate(captions([1, 7, 8, 30]))]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]))
    settings = {"teacher": str(tmp_path / "teacher"), "data": (str(tmp_path / "t.csv"),), "device": "cpu"}
    with caplog.at_level(logging.WARNING, logger="llm2clip"):
        report = evaluate(EvaluateConfig(**settings, out=tmp_path / "report"))
    said = [message.split(" are")[0] for message in caplog.messages if " captions (" in message]
    assert said == ["2 of 4 captions (50.0%)"]
    assert report["datasets"]["t"]["captions_cut"] == 2
