"""Tiny random decoders of eight families, one that chats like Llama-3, and data for stage 1; made on the spot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": 64}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 64}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 64}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "llama-64": ("LlamaConfig", {"hidden_size": 64, "intermediate_size": 128}),  # bitsandbytes packs 64 by 64
}


def make_llm(folder: Path, family: str, tokenizer_of: Path, **changes: object) -> Path:
    """A random causal LM folder of `family` with the tokenizer of another folder."""
    import torch
    import transformers

    name, extra = FAMILIES[family]
    config = getattr(transformers, name)(**{**SHAPE, **extra, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # transformers starts at a spread of 0.02, where attention hardly moves anything
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llm_of(tmp_path_factory: pytest.TempPathFactory, tiny_llm: Path) -> Callable[..., Path]:
    """A function: family -> folder of a tiny random LLM of that family, made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_llm(tmp_path_factory.mktemp("llm") / family, family, tiny_llm)
        return made[family]

    return get


LLAMA_3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)
SPECIAL = (
    "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|im_start|> <|im_end|> "
    "<start_of_turn> <end_of_turn> [INST] [/INST]"
).split()
CHAT_TEXTS = [
    "a red disc",
    "This image shows a large, blue square on a dark background. It's near the top.",
    "一只红色的猫 🐈",
]


@pytest.fixture(scope="session")
def chat_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level BPE tokenizer like Llama-3's, and its chat template."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CHAT_TEXTS] * 3, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]),
        ]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", model_max_length=512
    )
    fast.chat_template = LLAMA_3_TEMPLATE

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


def write_released(folder: Path, layout: str, chat_llm: Path) -> Path:
    """A folder as the released LLM2CLIP teachers lie on the Hub: LLM2Vec's classes, remote code that must not run.

    "8B": an encoder's class and bare keys. "1B": a two-way class, keys of a causal LM, no chat template.
    """
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    shutil.copytree(chat_llm, folder)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    if layout == "8B":
        module = "McGill-NLP/LLM2Vec-Meta-Llama-3-8B-Instruct-mntp--modeling_llama_encoder"
        config |= {"architectures": ["LlamaEncoderModel"], "auto_map": {"AutoModel": f"{module}.LlamaEncoderModel"}}
        weights = {name.removeprefix("model."): w for name, w in weights.items() if name != "lm_head.weight"}
    else:
        module = "modeling_bidirectional_llama_encoder"
        config |= {"architectures": ["LlamaBiModel"], "auto_map": {"AutoModel": f"{module}.LlamaBiModel"}}
        (folder / f"{module}.py").write_text("raise SystemExit('remote code was run')")
        tokenizer.chat_template = None
        (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder
