"""The fast path gives what `SentenceTransformer.encode` gives, whatever stands beside a caption in its batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding

from llm2clip.bank.encoder import CaptionEncoder
from llm2clip.bank.verify import cosines
from llm2clip.errors import LLM2CLIPError, UsageError
from llm2clip.teacher.model import llm_as_encoder, load_teacher

TEXTS = [
    "a red disc",
    "two small blue discs and the dark square near the corner of this plain image",
    "a",
    "the yellow square sits near the top , and the disc sits on the right",
    "a large green disc is in the middle",
    "圆 🙂",
] * 3


@pytest.fixture(scope="module")
def tiny_bert(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT folder, whose tokenizer gives token types."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=128, **sizes)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


def pipeline(name: str, tiny_llm: Path, tiny_bert: Path) -> SentenceTransformer:
    torch.manual_seed(0)
    if name == "llm":
        return load_teacher(tiny_llm, device="cpu")
    if name == "weighted":
        return llm_as_encoder(tiny_llm, pooling="weighted", device="cpu")
    if name == "last-token-left":
        teacher = llm_as_encoder(tiny_llm, pooling="last-token", attention="causal", device="cpu")
        teacher.tokenizer.padding_side = "left"
        return teacher
    if name == "static":
        static = StaticEmbedding(load_teacher(tiny_llm, device="cpu").tokenizer, embedding_dim=16)
        return SentenceTransformer(modules=[static, Normalize()], device="cpu")
    bert = Transformer(str(tiny_bert))
    modules = [bert, Pooling(32, pooling_mode="cls"), Dense(32, 24), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu", truncate_dim=20 if name == "bert-cut" else None)


PIPELINES = ("llm", "weighted", "last-token-left", "static", "bert", "bert-cut")


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("prompt", ["", "this is "])
def test_parity_with_encode(name: str, prompt: str, tiny_llm: Path, tiny_bert: Path) -> None:
    teacher = pipeline(name, tiny_llm, tiny_bert)
    expected = teacher.encode(TEXTS, prompt=prompt or None, batch_size=4)
    counts = teacher.preprocess(TEXTS, prompt=prompt or None)
    vectors, tokens = CaptionEncoder(teacher, prompt=prompt, dtype="float32", batch_tokens=40).encode(TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    if "attention_mask" in counts:
        assert tokens.tolist() == counts["attention_mask"].sum(1).tolist()
    else:
        assert (tokens > 0).all()


def test_a_prompt_that_is_not_pooled(tiny_llm: Path) -> None:
    teacher = load_teacher(tiny_llm, device="cpu")
    teacher[1].include_prompt = False
    expected = teacher.encode(TEXTS, prompt="this is ")
    vectors, _ = CaptionEncoder(teacher, prompt="this is ", dtype="float32").encode(TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=2e-6)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_neighbours_change_nothing_beyond_rounding(precision: torch.dtype, tiny_llm: Path) -> None:
    encoder = CaptionEncoder(load_teacher(tiny_llm, device="cpu", dtype=precision), dtype="float32", batch_tokens=120)
    together, _ = encoder.encode(TEXTS)
    alone = np.concatenate([encoder.encode([text])[0] for text in TEXTS])
    others, _ = encoder.encode([*TEXTS, *("large " * i for i in range(1, 60))])
    least = 0.999999 if precision == torch.float32 else 0.999
    assert cosines(together, alone).min() > least
    assert cosines(others[: len(TEXTS)], alone).min() > least
    different = cosines(alone[:1].repeat(4, 0), alone[1:5])
    assert different.max() < least - 0.001  # other captions lie further off than that


def test_equal_runs_give_equal_bytes(tiny_llm: Path) -> None:
    teacher = load_teacher(tiny_llm, device="cpu")
    one, other = (CaptionEncoder(teacher, batch_tokens=64).encode(TEXTS)[0] for _ in range(2))
    assert one.tobytes() == other.tobytes()


def test_no_texts(tiny_llm: Path) -> None:
    vectors, tokens = CaptionEncoder(load_teacher(tiny_llm, device="cpu")).encode([])
    assert vectors.shape == (0, 32) and tokens.shape == (0,)


def test_a_batch_too_large_for_memory_is_halved(tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = CaptionEncoder(load_teacher(tiny_llm, device="cpu"), dtype="float32")
    expected, _ = encoder.encode(TEXTS)
    forward = encoder._forward

    def small_memory(features):
        if features["input_ids"].numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(features)

    monkeypatch.setattr(encoder, "_forward", small_memory)
    np.testing.assert_allclose(encoder.encode(TEXTS)[0], expected, atol=2e-6)


def test_a_caption_too_large_for_memory_is_one_line(tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = CaptionEncoder(load_teacher(tiny_llm, device="cpu"))

    def no_memory(features):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(encoder, "_forward", no_memory)
    with pytest.raises(LLM2CLIPError, match=r"one caption of .* tokens does not fit"):
        encoder.encode(TEXTS)


@pytest.mark.slow
def test_a_compiled_teacher_gives_the_same(tiny_llm: Path) -> None:
    expected, _ = CaptionEncoder(load_teacher(tiny_llm, device="cpu"), dtype="float32", batch_tokens=40).encode(TEXTS)
    teacher = load_teacher(tiny_llm, device="cpu")
    compiled, _ = CaptionEncoder(teacher, dtype="float32", batch_tokens=40, compile=True).encode(TEXTS)
    np.testing.assert_allclose(compiled, expected, atol=2e-6)


def test_a_machine_that_cannot_compile_is_one_line(tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(tiny_llm, device="cpu")

    def no_compiler(features):
        raise RuntimeError("No working C++ compiler\nwas found")

    monkeypatch.setattr(teacher[0], "compile", lambda dynamic: monkeypatch.setattr(teacher[0], "forward", no_compiler))
    with pytest.raises(UsageError, match=r"^compile does not work here \(No working C\+\+ compiler was found\)"):
        CaptionEncoder(teacher, compile=True)
