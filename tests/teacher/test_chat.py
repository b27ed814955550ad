"""Chat-format teachers: the turn's header and closing token, and parity with the released teachers' encoding."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from llm2clip.errors import UsageError
from llm2clip.teacher.chat import turn_of
from llm2clip.teacher.model import llm_as_encoder, load_teacher, save
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
SPECIAL = (
    "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|im_start|> <|im_end|> "
    "<start_of_turn> <end_of_turn> [INST] [/INST]"
).split()
CAPTIONS = [
    "a red disc",
    "This picture shows a large, blue square on a dark background. It's near the top.",
    "一只红色的猫 🐈",
]


@pytest.fixture(scope="module")
def chat_llm(tmp_path_factory, llm_of) -> Path:
    """A random Llama with a byte-level BPE tokenizer like Llama-3's, and its chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS * 3, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", model_max_length=512
    )
    fast.chat_template = LLAMA_3
    import transformers

    folder = tmp_path_factory.mktemp("chat") / "Meta-Llama-3-tiny-Instruct"
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=600,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def released_encoding(folder: Path, captions: list[str], max_length: int = 512) -> np.ndarray:
    """Vectors as the released teachers make them, written out in plain torch.

    Each caption stands in a user's turn; padding is on the left with the end-of-text token; attention is two-way; the
    mean is over the states of the last n tokens, where n counts the caption with its closing token but no header.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModel.from_pretrained(folder, attn_implementation="eager")
    model.config.is_causal = False
    header = "<|start_header_id|>user<|end_header_id|>\n\n"
    wrapped = [header + caption.strip() + "<|eot_id|>" for caption in captions]
    batch = tokenizer(wrapped, return_tensors="pt", padding=True, truncation=True, max_length=max_length)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    pooled = []
    for row, caption in zip(states, captions, strict=True):
        length = len(tokenizer(caption.strip() + "<|eot_id|>", add_special_tokens=False)["input_ids"])
        pooled.append(row[-length:].mean(0))
    return torch.stack(pooled).numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_vectors_equal_the_released_teachers(chat_llm, tmp_path):
    expected = released_encoding(chat_llm, CAPTIONS)
    encoder = llm_as_encoder(chat_llm, chat_template=True, dtype="float32")
    assert cosine(encoder.encode(CAPTIONS), expected).min() > 0.99999
    one_by_one = np.concatenate([encoder.encode([caption]) for caption in CAPTIONS])
    assert cosine(one_by_one, expected).min() > 0.99999
    save(encoder, tmp_path / "t", attention="two-way")
    for reloaded in (load_teacher(tmp_path / "t"), SentenceTransformer(str(tmp_path / "t"), device="cpu")):
        assert cosine(reloaded.encode(CAPTIONS), expected).min() > 0.99999
    plain = llm_as_encoder(chat_llm, dtype="float32")
    assert cosine(plain.encode(CAPTIONS), expected).max() < 0.9999  # the wrapper matters, so the above says something


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
        check_prompt(llm_as_encoder(chat_llm), "picture ")


def test_a_plain_llm_gives_the_mean_over_all_tokens(llm_of):
    """Without a chat template, as LLM2Vec encodes single sentences when told to pool over every token."""
    folder = llm_of("llama")
    captions = ["a red disc", "a large blue square on the left of the dark background", "there"]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModel.from_pretrained(folder, attn_implementation="eager")
    model.config.is_causal = False
    batch = tokenizer(captions, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    lengths = batch["attention_mask"].sum(1)
    expected = torch.stack([row[-n:].mean(0) for row, n in zip(states, lengths, strict=True)]).numpy()
    assert cosine(llm_as_encoder(folder, dtype="float32").encode(captions), expected).min() > 0.99999
