"""Device, arithmetic, prompt and attention of the teacher."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from llm2clip.bank import load
from llm2clip.errors import UsageError
from llm2clip.teacher.model import load_teacher


def test_every_module_is_in_one_dtype(tiny_llm: Path, tmp_path: Path) -> None:
    transformer = Transformer(str(tiny_llm))
    model = SentenceTransformer(modules=[transformer, Pooling(32), Dense(32, 8)], device="cpu")
    model.save_pretrained(str(tmp_path / "dense"), create_model_card=False)
    teacher = load.load_for_encoding(str(tmp_path / "dense"), device=torch.device("cpu"), precision="bf16")
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    assert teacher.encode(["a red disc"]).shape == (1, 8)


def test_prompts(tiny_llm: Path) -> None:
    teacher = load_teacher(tiny_llm, device="cpu")
    assert load.resolve_prompt(teacher, None, None) == ""
    assert load.resolve_prompt(teacher, "say: ", None) == "say: "
    teacher.prompts = {"query": "find: ", "document": ""}
    assert load.resolve_prompt(teacher, None, "query") == "find: "
    with pytest.raises(UsageError, match="did you mean 'query'"):
        load.resolve_prompt(teacher, None, "queri")
    teacher.default_prompt_name = "query"
    assert load.resolve_prompt(teacher, None, None) == "find: "
    assert load.resolve_prompt(teacher, "", None) == ""
    teacher.prompts = {}
    with pytest.raises(UsageError, match="has no prompts"):
        load.resolve_prompt(teacher, None, "query")


def test_flash_attention_that_attends_otherwise_is_left_alone(tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(tiny_llm, device="cpu")
    before = teacher.encode(load.PROBES)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    def causal(implementation: str) -> None:
        teacher[0].model.config.is_causal = implementation == "flash_attention_2"

    monkeypatch.setattr(teacher[0].model, "set_attn_implementation", causal)
    assert not load.use_flash_attention(teacher)
    assert (teacher.encode(load.PROBES) == before).all()


def test_flash_attention_that_fails_is_left_alone(tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(tiny_llm, device="cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    set_implementation = teacher[0].model.set_attn_implementation

    def unsupported(implementation: str) -> None:
        if implementation == "flash_attention_2":
            raise ValueError("this model does not support Flash Attention 2.0 yet")
        set_implementation(implementation)

    monkeypatch.setattr(teacher[0].model, "set_attn_implementation", unsupported)
    assert not load.use_flash_attention(teacher)


def test_without_flash_attn_nothing_changes(tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(tiny_llm, device="cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(teacher[0].model, "set_attn_implementation", lambda name: pytest.fail(f"{name} was tried"))
    assert not load.use_flash_attention(teacher)


def test_flash_attention_that_attends_the_same_is_taken(tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(tiny_llm, device="cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    tried: list[str] = []
    monkeypatch.setattr(teacher[0].model, "set_attn_implementation", tried.append)
    assert load.use_flash_attention(teacher) and tried == ["flash_attention_2"]
