"""LLMs of other shapes: experts, an image half, few positions, tokens without a row, templates that read parts."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer

from llm2clip.errors import UsageError
from llm2clip.teacher.chat import turn_of
from llm2clip.teacher.model import llm, llm_as_encoder, load_teacher
from llm2clip.teacher.reach import check_length, freeze_unreached
from llm2clip.teacher.train import merge_checked
from llm2clip.teacher.tuning import add_lora, with_lora
from tests.conftest import write_tokenizer

TEXTS = ["a red disc", "a small blue square on a dark background"]
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
STACKED = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
MIXTURES = {
    "qwen3_moe": ({**SHAPE, **FEW, "head_dim": 8}, ATTENTION, STACKED),
    # a layer without experts, and a shared one, beside the stacks: plain linear layers
    "qwen2_moe": (
        {**SHAPE, **FEW, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0]},
        ATTENTION
        | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
        | {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
        | {"mlp.shared_expert_gate"},
        STACKED,
    ),
    "mixtral": ({**SHAPE, **LOCAL}, ATTENTION, STACKED),
    "olmoe": ({**SHAPE, **FEW}, ATTENTION, STACKED),
    "gpt_oss": ({**SHAPE, **LOCAL, "head_dim": 8}, ATTENTION, STACKED),
}
TEXT = {**SHAPE, "model_type": "llama"}
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28}
VISION = {**CLIP, "patch_size": 14}
MULTIMODAL = {
    "gemma3": {
        "text_config": {**SHAPE, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 64},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 120,
    },
    "llava": {
        "text_config": TEXT,
        "vision_config": {**VISION, "model_type": "clip_vision_model"},
        "image_token_index": 120,
    },
    "idefics3": {
        "text_config": TEXT,
        "vision_config": {**VISION, "model_type": "idefics3_vision"},
        "image_token_id": 120,
    },
}


def made(folder: Path, kind: str, loader: Any = None, **settings: Any) -> Path:
    """A random model of a kind, with a tokenizer of 60 words."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = (loader or transformers.AutoModelForCausalLM).from_config(config)
    with torch.no_grad():  # transformers starts at a spread of 0.02, where attention hardly moves anything
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def multimodal(folder: Path, kind: str) -> Path:
    """A random model with an image half, and its processor."""
    made(folder, kind, transformers.AutoModelForImageTextToText, **MULTIMODAL[kind])
    names = {"image_token": "<image>", "boi_token": "<begin>", "eoi_token": "<end>"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=names)
    if kind == "gemma3":
        images = transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28})
        processor: Any = transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)
    elif kind == "llava":
        processor = transformers.LlavaProcessor(transformers.CLIPImageProcessor(), tokenizer, patch_size=14)
    else:
        processor = transformers.Idefics3Processor(transformers.Idefics3ImageProcessor(), tokenizer)
    processor.save_pretrained(folder)
    return folder


def adapted(model: Any) -> tuple[set[str], set[str]]:
    """Names, without layer numbers, of the linear layers and of the single weights that have adapters."""
    layers, weights = set(), set()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            plain = name.replace(".base_layer", "").removeprefix("base_model.model.")
            parameter = getattr(module, "parameter_name", None)
            (weights if parameter else layers).add(f"{plain}.{parameter}" if parameter else plain)
    return layers, weights


def below_layers(names: set[str]) -> set[str]:
    return {re.sub(r"^.*layers\.\d+\.", "", name) for name in names}


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_get_adapters_without_dropout_and_what_stands_beside_them_with(tmp_path: Path, kind: str) -> None:
    """Whether a family is one that peft knows under older names of its layers, or not."""
    settings, layers, stacks = MIXTURES[kind]
    encoder = llm_as_encoder(made(tmp_path / "llm", kind, **settings))
    before = encoder.encode(TEXTS)
    add_lora(encoder, rank=2, dropout=0.25)

    found = adapted(llm(encoder))
    assert (below_layers(found[0]), below_layers(found[1])) == (layers, stacks)
    assert np.array_equal(encoder.encode(TEXTS), before)  # adapters start as nothing
    dropouts = {
        type(module).__name__: module.lora_dropout["default"]
        for module in llm(encoder).modules()
        if hasattr(module, "lora_A")
    }
    assert dropouts["Linear"].p == 0.25
    assert isinstance(dropouts["ParamWrapper"], torch.nn.Identity)
    assert llm(encoder).config.model_type == kind

    trained = [weight for weight in encoder.parameters() if weight.requires_grad]
    encoder.train()
    encoder(encoder.preprocess(TEXTS))["sentence_embedding"].sum().backward()
    assert all(weight.grad is not None for weight in trained)
    with torch.no_grad():
        for weight in trained:
            weight.normal_(std=0.02)
    error = merge_checked(encoder.eval(), [(text,) for text in TEXTS], tolerance=1e-5)
    assert error <= 1e-5
    assert not np.allclose(encoder.encode(TEXTS), before, atol=1e-3)


@pytest.mark.parametrize("kind", MULTIMODAL)
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_only_the_language_half_trains(tmp_path: Path, kind: str, tuning: str) -> None:
    """Gradients of captions and names agree: what trains is what the language half holds, all of it."""
    encoder = llm_as_encoder(multimodal(tmp_path / "llm", kind))
    half = "language_model" if kind != "idefics3" else "text_model"
    if tuning == "lora":
        add_lora(encoder, rank=2)
        layers, _ = adapted(llm(encoder))
        projections = {"gate", "up", "down"}
        expected = ATTENTION | {f"mlp.{name}_proj" for name in projections}
        assert layers == {f"{half}.layers.{i}.{name}" for i in (0, 1) for name in expected}
    else:
        frozen = freeze_unreached(llm(encoder))
        assert frozen == [name for name, _ in llm(encoder).named_parameters() if half not in name]
    encoder(encoder.preprocess(TEXTS))["sentence_embedding"].sum().backward()
    for name, weight in encoder.named_parameters():
        assert (weight.grad is not None) == weight.requires_grad, name


def test_all_of_a_text_llm_trains(tiny_llm: Path) -> None:
    assert freeze_unreached(llm(llm_as_encoder(tiny_llm))) == []


def test_the_output_layer_gets_no_adapter(tiny_llm: Path) -> None:
    model = with_lora(transformers.AutoModelForCausalLM.from_pretrained(tiny_llm), rank=2)
    layers, weights = adapted(model)
    assert "lm_head" not in layers
    assert weights == set()
    assert len(layers) == 2 * 7


def test_what_peft_cannot_adapt_is_one_line(tmp_path: Path) -> None:
    settings = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
    encoder = llm_as_encoder(made(tmp_path / "llm", "mamba", **settings), attention="causal")
    with pytest.raises(UsageError, match=r"peft cannot adapt this LLM .*tuning='full'"):
        add_lora(encoder)


POSITIONS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
    },
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 40},
    "biogpt": {**SHAPE, "max_position_embeddings": 40},
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_a_table_of_positions_is_known_before_the_first_caption(tmp_path: Path, kind: str) -> None:
    folder = made(tmp_path / "llm", kind, **{"vocab_size": 128, **POSITIONS[kind]})
    with pytest.raises(UsageError, match=r"positions for 40 tokens, and is to read 41 of a caption; give .*40"):
        llm_as_encoder(folder, max_length=41)
    long = " ".join(["red"] * 60)
    assert np.isfinite(llm_as_encoder(folder, max_length=40).encode([long])).all()


def test_positions_that_are_computed_have_no_end(tmp_path: Path) -> None:
    folder = made(tmp_path / "llm", "llama", **SHAPE, max_position_embeddings=40)
    assert np.isfinite(llm_as_encoder(folder, max_length=64).encode([" ".join(["red"] * 80)])).all()


def test_positions_of_an_embedder(tmp_path: Path) -> None:
    """Two of a RoBERTa's 40 positions are never used: with 40 tokens to read it fails at 39."""
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.RobertaConfig(**shape, num_attention_heads=2, max_position_embeddings=40, pad_token_id=1)
    transformers.RobertaModel(config).save_pretrained(tmp_path / "roberta")
    write_tokenizer(tmp_path / "roberta")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "roberta", pad_token="<s>")
    tokenizer.save_pretrained(tmp_path / "roberta")
    encoder = SentenceTransformer(str(tmp_path / "roberta"), device="cpu")
    for limit in (40, 38):
        encoder.max_seq_length = limit
        encoder.save_pretrained(str(tmp_path / f"{limit}"))
    with pytest.raises(UsageError, match="positions for 38 tokens, and is to read 40"):
        load_teacher(tmp_path / "40")
    assert np.isfinite(load_teacher(tmp_path / "38").encode([" ".join(["red"] * 80)])).all()


def test_the_search_for_positions_costs_no_run_of_a_large_model(tmp_path: Path) -> None:
    """A long input goes through no block of a model whose table is read before them, and through no other at all."""
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    bert = transformers.BertModel(transformers.BertConfig(**shape, num_attention_heads=2, max_position_embeddings=40))
    llama = transformers.LlamaModel(transformers.LlamaConfig(**SHAPE, max_position_embeddings=40))
    for model, blocks, table in ((bert, bert.encoder.layer, True), (llama, llama.layers, False)):
        runs: list[str] = []
        model.get_input_embeddings().register_forward_hook(lambda *_, runs=runs: runs.append("embeddings"))
        blocks[0].register_forward_hook(lambda *_, runs=runs: runs.append("block"))
        check_length(SimpleNamespace(model=model.eval(), max_seq_length=40), "it")  # type: ignore[arg-type]
        assert runs == ["embeddings"] * table
    with pytest.raises(UsageError, match="positions for 40 tokens, and is to read 41 of"):
        check_length(SimpleNamespace(model=bert, max_seq_length=41), "it")  # type: ignore[arg-type]


def test_a_model_that_fails_two_way_is_one_line(tmp_path: Path) -> None:
    settings = {"vocab_size": 128, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}
    folder = made(tmp_path / "llm", "mpt", **settings)
    with pytest.raises(UsageError, match=r"fails with two-way attention .*; give attention='causal'"):
        llm_as_encoder(folder, max_length=100)
    assert np.isfinite(llm_as_encoder(folder, max_length=100, attention="causal").encode(TEXTS)).all()
    with pytest.raises(UsageError, match="positions for 256 tokens, and is to read 257"):
        llm_as_encoder(folder, max_length=257, attention="causal")


def with_tokens(folder: Path, **special: str) -> Path:
    """A Llama of 64 rows whose tokenizer has words for each of them, and special tokens beyond."""
    made(folder, "llama", **{**SHAPE, "vocab_size": 64})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"filler{i}" for i in range(64 - len(tokenizer))])
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_padding_token_without_a_row_is_replaced(tmp_path: Path) -> None:
    """Padding is masked: a padded caption's vector is that of the caption alone."""
    encoder = llm_as_encoder(with_tokens(tmp_path / "llm", pad_token="[PAD]"))
    assert encoder.tokenizer.pad_token == "</s>"
    together = encoder.encode(TEXTS)
    assert np.allclose(together[0], encoder.encode(TEXTS[:1])[0], atol=1e-5)
    encoder.save_pretrained(str(tmp_path / "saved"))
    assert np.array_equal(load_teacher(tmp_path / "saved").encode(TEXTS), together)


def test_a_word_without_a_row_is_one_line(tmp_path: Path) -> None:
    folder = with_tokens(tmp_path / "llm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["turquoise"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UsageError, match=r"'turquoise' has the id 64, and its embedding only 64 rows .*resize"):
        llm_as_encoder(folder)


def test_a_begin_token_without_a_row_is_one_line(tmp_path: Path) -> None:
    from tokenizers import processors

    folder = with_tokens(tmp_path / "llm", bos_token="[BOS]")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    template = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 64)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(folder)
    with pytest.raises(UsageError, match=r"'\[BOS\]' has the id 64"):
        llm_as_encoder(folder)


def test_a_special_token_that_no_caption_holds_is_let_pass(tmp_path: Path) -> None:
    """As the image token that a family's LLMs for text alone have in their tokenizer."""
    folder = with_tokens(tmp_path / "llm", sep_token="<image>")
    assert np.isfinite(llm_as_encoder(folder).encode(TEXTS)).all()


TEXT_PARTS = "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
PARTS = {
    "looped over": TEXT_PARTS,
    "the first": "{{ m['content'][0]['text'] }}",
    "text refused": "{% if m['content'] is string %}{{ raise_exception('parts only') }}{% endif %}" + TEXT_PARTS,
    "either": "{% if m['content'] is string %}{{ m['content'] }}{% else %}" + TEXT_PARTS + "{% endif %}",
    "text alone": "{{ m['content'] | trim }}",
}


@pytest.mark.parametrize("content", PARTS)
def test_templates_that_read_parts(tiny_llm: Path, content: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llm)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>", "<end>"]})
    tokenizer.chat_template = "{% for m in messages %}<turn>{{ m['role'] }}: " + PARTS[content] + "<end>{% endfor %}"
    assert turn_of(tokenizer) == ("<turn>user:", "<end>")


@pytest.mark.parametrize("content", ["{{ raise_exception('no users here') }}", "{{ m['content'] | lower }}", "x"])
def test_templates_that_take_no_turn_are_one_line(tiny_llm: Path, content: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llm)
    tokenizer.chat_template = "{% for m in messages %}" + content + "</s>{% endfor %}"
    with pytest.raises(UsageError, match="template does not take a user's turn") as caught:
        turn_of(tokenizer)
    assert "\n" not in str(caught.value)
