"""Captions without padding, as with flash attention: its kernel is stood in for by plain attention, text by text."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils

from llm2clip.bank import encoder as encoder_module
from llm2clip.bank.encoder import CaptionEncoder
from llm2clip.bank.load import use_flash_attention
from llm2clip.teacher.model import llm_as_encoder, load_teacher

TEXTS = ["a red disc", "two small blue discs and the dark square near the corner", "a", "圆 🙂", "the disc is red"] * 3


@dataclass
class Kernel:
    """A stand-in for flash-attn.

    Attributes:
        lengths: of the texts of each call that got them without padding.
    """

    lengths: list[list[int]] = field(default_factory=list)

    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        """Attention of texts laid one after another `[tokens, heads, width]`."""
        assert len(q) == len(k) == int(cu_seqlens_q[-1]) and torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths = cu_seqlens_q.diff().tolist()
        self.lengths.append(lengths)
        parts = []
        for one_q, one_k, one_v in zip(*(tensor.split(lengths) for tensor in (q, k, v)), strict=True):
            heads = [tensor.transpose(0, 1) for tensor in (one_q, one_k, one_v)]
            one = scaled_dot_product_attention(*heads, is_causal=causal, scale=softmax_scale, enable_gqa=True)
            parts.append(one.transpose(0, 1))
        return torch.cat(parts)

    def padded(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False, softmax_scale=None, **ignored) -> Tensor:
        """Attention of texts of one length `[texts, tokens, heads, width]`."""
        heads = [tensor.transpose(1, 2) for tensor in (q, k, v)]
        out = scaled_dot_product_attention(*heads, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A machine that has flash-attn, as far as this package, sentence-transformers and transformers can see."""
    stand_in = Kernel()
    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    package.flash_attn_func, package.flash_attn_varlen_func = stand_in.padded, stand_in.varlen
    package.flash_attn_with_kvcache = None
    padding.pad_input = modeling_flash_attention_utils._pad_input
    padding.unpad_input = modeling_flash_attention_utils._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda **options: True)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    return stand_in


def teacher_of(name: str, tiny_llm: Path, roberta: Path) -> SentenceTransformer:
    if name == "llm":
        return load_teacher(tiny_llm, device="cpu")
    if name == "prompt not pooled":
        teacher = load_teacher(tiny_llm, device="cpu")
        teacher[1].include_prompt = False
        return teacher
    if name == "roberta":
        return SentenceTransformer(modules=[Transformer(str(roberta)), Pooling(32, pooling_mode="cls")], device="cpu")
    attention = "causal" if name == "last-token" else "two-way"
    return llm_as_encoder(tiny_llm, pooling=name, attention=attention, device="cpu")


@pytest.fixture(scope="module")
def roberta(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random RoBERTa folder: its positions begin after that of the padding."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    folder = tmp_path_factory.mktemp("roberta")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    RobertaModel(RobertaConfig(vocab_size=128, max_position_embeddings=130, pad_token_id=0, **sizes)).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(folder)
    return folder


def allow_flash_attention(teacher: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip transformers' own check, which wants a GPU."""
    config = teacher[0].model.config

    def switch(name: str) -> None:
        config._attn_implementation = name

    monkeypatch.setattr(teacher[0].model, "set_attn_implementation", switch)


@pytest.mark.parametrize("name", ["llm", "weighted", "last-token", "roberta", "prompt not pooled"])
@pytest.mark.parametrize("prompt", ["", "this is "])
def test_vectors_without_padding_are_those_with_it(
    name: str, prompt: str, tiny_llm: Path, roberta: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_of(name, tiny_llm, roberta)
    padded = CaptionEncoder(teacher, prompt=prompt, dtype="float32", batch_tokens=60)
    expected, tokens = padded.encode(TEXTS)
    assert not padded.varlen and not kernel.lengths  # the package alone is not enough
    allow_flash_attention(teacher, monkeypatch)
    assert use_flash_attention(teacher)
    flat = CaptionEncoder(teacher, prompt=prompt, dtype="float32", batch_tokens=60)
    assert flat.varlen
    kernel.lengths.clear()
    vectors, counts = flat.encode(TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    assert counts.tolist() == tokens.tolist()
    assert kernel.lengths[::2] == kernel.lengths[1::2]  # two layers
    assert sorted(chain.from_iterable(kernel.lengths[::2])) == sorted(tokens)
    assert max(map(len, kernel.lengths)) > 1


@pytest.mark.usefixtures("kernel")
def test_a_teacher_told_to_pad_is_padded(tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(tiny_llm, device="cpu")
    expected, _ = CaptionEncoder(teacher, dtype="float32").encode(TEXTS)
    allow_flash_attention(teacher, monkeypatch)
    assert use_flash_attention(teacher)
    teacher[0].unpad_inputs = False
    encoder = CaptionEncoder(teacher, dtype="float32")
    assert not encoder.varlen
    np.testing.assert_allclose(encoder.encode(TEXTS)[0], expected, atol=2e-6)


def test_a_teacher_that_lays_its_texts_flat_itself(
    tiny_llm: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose tokenizer is a slow one does."""
    teacher = load_teacher(tiny_llm, device="cpu")
    expected, tokens = CaptionEncoder(teacher, dtype="float32").encode(TEXTS)
    allow_flash_attention(teacher, monkeypatch)
    assert use_flash_attention(teacher)
    monkeypatch.setattr(encoder_module, "can_tokenise_ahead", lambda teacher: False)
    kernel.lengths.clear()
    vectors, counts = CaptionEncoder(teacher, dtype="float32").encode(TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    assert counts.tolist() == tokens.tolist() and max(map(len, kernel.lengths)) > 1
