"""Other people's embedders as teachers: their own pooling, prompts and routes, as they encode by themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, StaticEmbedding
from transformers import AutoTokenizer, BertConfig, BertModel

from llm2clip.bank.encoder import CaptionEncoder
from llm2clip.bank.load import resolve_prompt
from llm2clip.errors import UsageError
from llm2clip.teacher.model import load_teacher, teacher_fingerprint

TEXTS = ["a red disc", "a large blue square on the left of the dark background", "there"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tiny_llm) -> Path:
    """A random BERT, as MiniLM and bge are, with a tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(5)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
    BertModel(BertConfig(vocab_size=128, hidden_size=32, **shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llm, model_max_length=64).save_pretrained(folder)
    return folder


def embedder(kind: str, bert: Path, tiny_llm: Path) -> SentenceTransformer:
    def bge() -> list[Any]:
        return [Transformer(str(bert)), Pooling(32, "cls"), Normalize()]

    def static() -> list[Any]:
        return [StaticEmbedding(AutoTokenizer.from_pretrained(tiny_llm).backend_tokenizer, embedding_dim=32)]

    def qwen3() -> list[Any]:
        return [Transformer(str(tiny_llm)), Pooling(32, "lasttoken", include_prompt=True), Normalize()]

    def split(query: list[Any], document: list[Any], **options: Any) -> Router:
        return Router({"query": query, "document": document}, **options)

    torch.manual_seed(6)
    build: dict[str, Callable[[], tuple[list[Any], dict[str, Any]]]] = {
        "asked": lambda: (qwen3(), {"prompts": {"query": "find the image : ", "document": ""}}),
        "prompted": lambda: (bge(), {"prompts": {"document": "a shape : "}, "default_prompt_name": "document"}),
        "static": lambda: (static(), {}),
        "cut": lambda: ([*bge()[:2], Dense(32, 16)], {"truncate_dim": 8}),
        "router": lambda: ([split(static(), bge(), default_route="document")], {}),
        "asking router": lambda: ([split(static(), bge(), allow_empty_key=False)], {}),
        "shared pooling": lambda: (
            [split(bge()[:1], bge()[:1], default_route="document"), Pooling(32, "mean")],
            {},
        ),
    }
    modules, options = build[kind]()
    return SentenceTransformer(modules=modules, device="cpu", **options)


KINDS = ["asked", "prompted", "static", "cut", "router", "asking router", "shared pooling"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedder_gives_its_own_document_vectors(kind, bert, tiny_llm, tmp_path):
    model = embedder(kind, bert, tiny_llm)
    expected = model.encode_document(TEXTS)
    assert expected.shape == (3, 8 if kind == "cut" else 32)
    model.save(str(tmp_path / "a"), create_model_card=False)
    teacher = load_teacher(tmp_path / "a", device="cpu")
    np.testing.assert_allclose(teacher.encode(TEXTS), expected, atol=1e-6)
    banked = CaptionEncoder(teacher, prompt=resolve_prompt(teacher, None, None), dtype="float32").encode(TEXTS)[0]
    np.testing.assert_allclose(banked, expected, atol=1e-6)
    assert teacher_fingerprint(teacher) == teacher_fingerprint(tmp_path / "a")


@pytest.mark.parametrize("kind", ["router", "shared pooling"])
def test_the_fingerprint_of_a_router_covers_its_routes(kind, bert, tiny_llm, tmp_path):
    model = embedder(kind, bert, tiny_llm)
    model.save(str(tmp_path / "a"), create_model_card=False)
    before = teacher_fingerprint(tmp_path / "a")
    tokenizer = next((tmp_path / "a").glob("document_0_*")) / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"red"', '"rot"'))
    renamed = teacher_fingerprint(tmp_path / "a")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save(str(tmp_path / "b"), create_model_card=False)
    assert len({before, renamed, teacher_fingerprint(tmp_path / "b")}) == 3


def test_a_router_without_a_way_for_captions_is_refused(bert, tiny_llm, tmp_path):
    routes = {name: [Transformer(str(bert)), Pooling(32, "mean")] for name in ("left", "right")}
    SentenceTransformer(modules=[Router(routes, allow_empty_key=False)], device="cpu").save(
        str(tmp_path / "a"), create_model_card=False
    )
    with pytest.raises(UsageError, match="routes left, right and no default; set its default_route"):
        load_teacher(tmp_path / "a")
