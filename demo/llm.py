"""The mini LLM: a small Llama pretrained by next-token prediction on the text of `demo.text`.

Letters: B sequences of a batch, L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from demo.text import documents
from llm2clip.progress import Progress
from llm2clip.student.muon import Muon

END = 3
"""The tokenizer's `</s>`, between documents."""
DECAY_SHARE = 0.6
"""Learning rates fall linearly to 0 over this last part of the training."""


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """How the mini LLM is made.

    Attributes:
        width, layers, heads, inner: of the Llama.
        batch_size, length: sequences a step, tokens a sequence.
        muon_rate, adam_rate: peaks, of the layers' matrices and of all else.
    """

    steps: int
    width: int = 192
    layers: int = 4
    heads: int = 4
    inner: int = 512
    batch_size: int = 32
    length: int = 160
    muon_rate: float = 0.02
    adam_rate: float = 4e-3
    warmup_steps: int = 50
    seed: int = 0


def new_llm(vocab_size: int, how: Pretraining) -> Any:
    """A Llama of random weights, input and output words tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(how.seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=how.width,
        intermediate_size=how.inner,
        num_hidden_layers=how.layers,
        num_attention_heads=how.heads,
        num_key_value_heads=how.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config)


def token_batches(tokenizer: Any, how: Pretraining) -> Iterator[Tensor]:
    """Documents one after another, cut into int64 `[B, L]`, without end."""
    texts = documents(seed=how.seed)
    held: list[int] = []
    need = how.batch_size * how.length
    while True:
        while len(held) < need:
            for ids in tokenizer(list(islice(texts, 200)))["input_ids"]:
                held += [*ids, END]
        yield torch.tensor(held[:need]).view(how.batch_size, how.length)
        held = held[need:]


def pretrain(model: Any, tokenizer: Any, how: Pretraining, *, device: str = "cpu") -> list[dict[str, float]]:
    """Train `model` in place; returns the log, a line every 50 steps."""
    model.to(device).train()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    optimizers = [
        Muon(matrices, lr=how.muon_rate, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=how.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    log: list[dict[str, float]] = []
    with Progress(how.steps, description="mini LLM", unit="steps") as progress:
        for step, batch in zip(range(how.steps), token_batches(tokenizer, how), strict=False):
            factor = min(1.0, (step + 1) / how.warmup_steps, (1 - step / how.steps) / DECAY_SHARE)
            for optimizer, peak in zip(optimizers, (how.muon_rate, how.adam_rate), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = peak * factor
            loss = next_token_loss(model, batch.to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            progress.advance(note=f"loss {loss.item():.3f}")
            if step % 50 == 49 or step + 1 == how.steps:
                log.append({"step": step + 1, "loss": round(loss.item(), 4)})
    return log


def next_token_loss(model: Any, tokens: Tensor) -> Tensor:
    """The mean cross-entropy [] of each token after those before it, in bf16 arithmetic."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        states = model.model(input_ids=tokens).last_hidden_state
        logits = linear(states[:, :-1], model.lm_head.weight)
    return cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
