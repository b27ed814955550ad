"""Parity with LLM2Vec, whose encoding the released LLM2CLIP teachers use, and those teachers' folders as they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from llm2clip.bank.encoder import CaptionEncoder
from llm2clip.bank.load import resolve_prompt
from llm2clip.teacher.model import llm_as_encoder, load_teacher, save, teacher_fingerprint
from tests.teacher.conftest import write_released

CAPTIONS = [
    "a red disc",
    "This image shows a large, blue square on a dark background. It's near the top.",
    "一只红色的猫 🐈",
]
MARK = "!@#$%^&*()"
HEADER, CLOSING = "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"


def llm2vec(folder: Path, captions: list[str], *, chat: bool, skip_instruction: bool) -> np.ndarray:
    """Vectors as LLM2Vec computes them for a batch of captions without instruction, in plain torch.

    A mark stands between the instruction (here empty, but the chat header comes before it) and the caption. The whole
    is tokenised with the tokenizer's own special tokens and padded on the left. With `skip_instruction` the mean is
    over the last n states, n being the tokens of what follows the mark (tokenised alone, without special tokens);
    else over all states that are not padding. Two-way attention is not the model's own flag, which stays causal, but
    a mask of four dimensions that hides the padding and nothing else.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    assert getattr(model.config, "is_causal", True)
    texts = [MARK + caption for caption in captions]
    if chat:
        texts = [HEADER + text.strip() + CLOSING for text in texts]
    batch = tokenizer([text.replace(MARK, "") for text in texts], return_tensors="pt", padding=True)
    visible = batch["attention_mask"][:, None, None, :].expand(-1, 1, batch["input_ids"].shape[1], -1)
    hidden = (1.0 - visible.float()) * torch.finfo(torch.float32).min
    with torch.no_grad():
        states = model(input_ids=batch["input_ids"], attention_mask=hidden).last_hidden_state
    pooled = []
    for row, mask, text in zip(states, batch["attention_mask"], texts, strict=True):
        after = tokenizer(text.split(MARK)[1], add_special_tokens=False)["input_ids"]
        pooled.append(row[-(len(after) if skip_instruction else int(mask.sum())) :].mean(0))
    return torch.stack(pooled).numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_vectors_equal_llm2vecs_in_its_chat_wrapper(chat_llm, tmp_path):
    expected = llm2vec(chat_llm, CAPTIONS, chat=True, skip_instruction=True)
    encoder = llm_as_encoder(chat_llm, chat_template=True, dtype="float32")
    assert cosine(encoder.encode(CAPTIONS), expected).min() > 0.99999
    one_by_one = np.concatenate([encoder.encode([caption]) for caption in CAPTIONS])
    assert cosine(one_by_one, expected).min() > 0.99999
    save(encoder, tmp_path / "t", attention="two-way")
    for reloaded in (load_teacher(tmp_path / "t"), SentenceTransformer(str(tmp_path / "t"), device="cpu")):
        assert cosine(reloaded.encode(CAPTIONS), expected).min() > 0.99999
    wrong = [
        llm_as_encoder(chat_llm, dtype="float32"),
        llm_as_encoder(chat_llm, chat_template=True, attention="causal", dtype="float32"),
    ]
    for other in wrong:  # wrapper and attention matter, so the above says something
        assert cosine(other.encode(CAPTIONS), expected).max() < 0.9999
    assert cosine(llm2vec(chat_llm, CAPTIONS, chat=True, skip_instruction=False), expected).max() < 0.9999


def test_vectors_equal_llm2vecs_without_the_wrapper(chat_llm, tmp_path):
    """LLM2Vec leaves the begin-of-text token out of the mean unless told otherwise; without one there is no choice."""
    ours = llm_as_encoder(chat_llm, dtype="float32").encode(CAPTIONS)
    assert cosine(ours, llm2vec(chat_llm, CAPTIONS, chat=False, skip_instruction=False)).min() > 0.99999
    beginless = tmp_path / "llm"
    shutil.copytree(chat_llm, beginless)
    tokenizer = AutoTokenizer.from_pretrained(chat_llm)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(beginless)
    ours = llm_as_encoder(beginless, dtype="float32").encode(CAPTIONS)
    for skip in (True, False):
        expected = llm2vec(beginless, CAPTIONS, chat=False, skip_instruction=skip)
        assert cosine(ours, expected).min() > 0.99999


@pytest.fixture(params=["encoder-class, bare keys", "bi-class, keys of a causal LM, no chat template"])
def released(request, chat_llm, tmp_path) -> Path:
    layout = "8B" if request.param.startswith("encoder") else "1B"
    return write_released(tmp_path / "LLM2CLIP-tiny-CC-Finetuned", layout, chat_llm)


@pytest.mark.parametrize("trust", [False, True])
def test_a_released_teacher_encodes_as_it_was_made_to(trust, released, chat_llm, caplog):
    expected = llm2vec(chat_llm, CAPTIONS, chat=True, skip_instruction=True)
    teacher = load_teacher(released, trust_remote_code=trust)
    assert cosine(teacher.encode(CAPTIONS), expected).min() > 0.99999
    assert "--chat-template" not in caplog.text
    encoder = CaptionEncoder(teacher, prompt=resolve_prompt(teacher, None, None), dtype="float32")
    assert cosine(encoder.encode(CAPTIONS)[0], expected).min() > 0.99999
    wrapped = llm_as_encoder(released, chat_template=True)
    assert teacher_fingerprint(teacher) == teacher_fingerprint(wrapped)
    assert teacher_fingerprint(teacher) != teacher_fingerprint(llm_as_encoder(released))
    assert "add chat_template=True" in caplog.text


def test_only_llama_3_from_llm2vec_is_wrapped_unasked(chat_llm, released):
    assert not load_teacher(chat_llm).prompts.get("caption")
    tokenizer = AutoTokenizer.from_pretrained(released)
    text = (released / "tokenizer.json").read_text(encoding="utf-8").replace("<|eot_id|>", "<|other|>")
    tokenizer.save_pretrained(released)
    (released / "tokenizer.json").write_text(text, encoding="utf-8")
    teacher = load_teacher(released)
    assert not teacher.prompts.get("caption")
    assert (
        cosine(teacher.encode(CAPTIONS), llm2vec(released, CAPTIONS, chat=False, skip_instruction=False)).min() > 0.99
    )


def test_the_header_stands_before_every_text_whatever_the_call(released, chat_llm, tmp_path):
    """sentence-transformers' retrieval calls take prompts of their own, and do not fall back to the default one."""
    expected = llm2vec(chat_llm, CAPTIONS, chat=True, skip_instruction=True)
    save(load_teacher(released), tmp_path / "teacher", attention="two-way")
    for teacher in (load_teacher(released), SentenceTransformer(str(tmp_path / "teacher"), device="cpu")):
        for encode in (teacher.encode, teacher.encode_query, teacher.encode_document):
            assert cosine(encode(CAPTIONS), expected).min() > 0.99999


def test_white_space_at_a_captions_end_is_not_read(released, chat_llm, tmp_path):
    untidy = [f"{caption}{end}" for caption, end in zip(CAPTIONS, (" \n", "\n\n", "  "), strict=True)]
    teacher = load_teacher(released)
    np.testing.assert_allclose(teacher.encode(untidy), teacher.encode(CAPTIONS), atol=1e-6)
    expected = llm2vec(chat_llm, untidy, chat=True, skip_instruction=True)
    assert cosine(teacher.encode(untidy), expected).min() > 0.99999
    save(teacher, tmp_path / "teacher", attention="two-way")
    saved = SentenceTransformer(str(tmp_path / "teacher"), device="cpu")
    np.testing.assert_allclose(saved.encode(untidy), teacher.encode(CAPTIONS), atol=1e-6)


def test_what_is_written_names_no_code_of_others(released, tmp_path):
    save(load_teacher(released), tmp_path / "teacher", attention="two-way")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert "auto_map" not in config and config["architectures"] == ["LlamaModel"]
