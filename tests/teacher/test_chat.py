"""Chat-format teachers: the header and closing token of a turn, and what of it is pooled."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from llm2clip.errors import UsageError
from llm2clip.teacher.chat import strip_ends, turn_of
from llm2clip.teacher.model import llm_as_encoder
from llm2clip.teacher.trainer import check_prompt

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)
LLAMA_31 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>"
    "{% endfor %}"
)
QWEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_without_the_flag_a_chat_template_is_not_applied(chat_llm):
    encoder = llm_as_encoder(chat_llm, dtype="float32")
    ids = encoder.preprocess(["a red disc"])["input_ids"][0].tolist()
    assert ids == AutoTokenizer.from_pretrained(chat_llm)("a red disc")["input_ids"]


def test_a_cut_caption_keeps_its_closing_token(chat_llm):
    encoder = llm_as_encoder(chat_llm, chat_template=True, max_length=20)
    ids = encoder.preprocess(["a red disc " * 50], prompt=encoder.prompts["caption"])["input_ids"][0]
    assert len(ids) == 20 and encoder[0].tokenizer.decode(ids).endswith("<|eot_id|>")


@pytest.mark.parametrize(
    ("template", "turn"),
    [
        (LLAMA_3, ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>")),
        (LLAMA_31, ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>")),
        (QWEN, ("<|im_start|>user\n", "<|im_end|>")),
        (GEMMA, ("<start_of_turn>user\n", "<end_of_turn>")),
        (MISTRAL, ("[INST]", "[/INST]")),
    ],
    ids=["llama-3", "llama-3.1", "qwen", "gemma", "mistral"],
)
def test_a_turn_is_found_without_the_system_message(template, turn, chat_llm, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(chat_llm)
    tokenizer.chat_template = template
    assert turn_of(tokenizer) == turn
    folder = tmp_path / "llm"
    shutil.copytree(chat_llm, folder)
    tokenizer.save_pretrained(folder)
    encoder = llm_as_encoder(folder, chat_template=True, dtype="float32")
    check_prompt(encoder, encoder.prompts["caption"])
    features = encoder.preprocess(["a red disc"], prompt=encoder.prompts["caption"])
    text = encoder[0].tokenizer.decode(features["input_ids"][0])
    assert text.replace("<|begin_of_text|>", "") == f"{turn[0]}a red disc{turn[1]}"
    with torch.no_grad():
        states = encoder[0](features)["token_embeddings"][0]
    pooled = len(encoder[0].tokenizer("a red disc")["input_ids"]) - 1  # less the first token: caption and closing
    np.testing.assert_allclose(encoder.encode(["a red disc"])[0], states[-pooled:].mean(0).numpy(), atol=1e-6)


def test_a_template_without_a_closing_token_is_refused(chat_llm):
    tokenizer = AutoTokenizer.from_pretrained(chat_llm)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(UsageError, match="closes a turn with no special token"):
        turn_of(tokenizer)


def test_an_instruction_is_left_out_of_the_pooling(chat_llm):
    from llm2clip.teacher.trainer import _query_prompts

    for wrapped in (False, True):
        encoder = llm_as_encoder(chat_llm, chat_template=wrapped, dtype="float32")
        prompts = _query_prompts(encoder, "Given a caption, retrieve a similar relevant caption.")
        check_prompt(encoder, prompts["query"])
        features = encoder.preprocess(["a red disc"], prompt=prompts["query"])
        states = encoder[0](dict(features))["token_embeddings"][0]
        pooled = len(encoder[0].tokenizer("a red disc")["input_ids"]) - 1
        vector = encoder(features)["sentence_embedding"][0]
        torch.testing.assert_close(vector, states[-pooled:].mean(0), rtol=1e-4, atol=1e-6)
    with pytest.raises(Exception, match="melts into"):
        check_prompt(llm_as_encoder(chat_llm), "image ")


@pytest.mark.parametrize("template", [LLAMA_3, QWEN, GEMMA, MISTRAL], ids=["llama-3", "qwen", "gemma", "mistral"])
def test_the_white_space_behind_a_caption_is_dropped_and_that_of_the_header_stays(template, chat_llm, tmp_path):
    folder = shutil.copytree(chat_llm, tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    encoder = llm_as_encoder(folder, chat_template=True, dtype="float32")
    strip_ends(encoder[0].tokenizer, encoder.prompts["caption"])
    check_prompt(encoder, encoder.prompts["caption"])
    for tidy in ("a red disc", "user", "two\nlines"):
        rows = [
            encoder.preprocess([text], prompt=encoder.prompts["caption"])["input_ids"][0].tolist()
            for text in (tidy, f"{tidy} ", f"{tidy} \n\t")
        ]
        assert rows[0] == rows[1] == rows[2]
