"""Stage 1 and MNTP once more, in plain PyTorch, from what docs/teacher.md and `TeacherConfig` say.

Left to the run that is compared: which texts it drew, which tokens it hid, and how its adapters started.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoTokenizer, LlamaForCausalLM

HEADER, CLOSING = "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"
Batch = Sequence[Mapping[str, Any]]


@dataclass
class Trace:
    """What a run leaves: a number for each step, and the weights at its end, adapters merged, by their LLM's names."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


class Oracle:
    """One LLM and the weights on it that train.

    Args:
        config: a `TeacherConfig`, whose fields are read by their meaning.
        folder: of the LLM, a Llama.
        down: for LoRA, how A of each linear layer starts, by its name in the LLM; B starts at 0.
        llm: the LLM's weights, if they are no longer those in `folder`.
    """

    def __init__(
        self, config: Any, folder: Any, *, down: Mapping[str, Tensor], llm: Mapping[str, Tensor] | None = None
    ) -> None:
        self.config = config
        self.model, self.tokenizer = _read(str(folder))
        self.llm = {name: w.detach().clone() for name, w in (llm or dict(self.model.named_parameters())).items()}
        self.trained: dict[str, Tensor] = {}
        if config.tuning == "full":
            self.trained = dict(self.llm)
        if config.tuning == "lora":
            layers = {n: m for n, m in self.model.model.named_modules() if isinstance(m, torch.nn.Linear)}
            assert set(down) == set(layers), "adapters sit on every linear layer but the output"
            for name, layer in layers.items():
                assert down[name].shape == (config.lora_rank, layer.in_features)
                self.trained[f"model.{name}.A"] = down[name].clone()
                self.trained[f"model.{name}.B"] = torch.zeros(layer.out_features, config.lora_rank)

    def whole(self) -> dict[str, Tensor]:
        """The LLM's weights as they stand: W + alpha / rank * B A."""
        whole = {**self.llm, **{name: w for name, w in self.trained.items() if name in self.llm}}
        for name in [name[:-2] for name in self.trained if name.endswith(".A")]:
            update = self.trained[f"{name}.B"] @ self.trained[f"{name}.A"]
            whole[f"{name}.weight"] = (
                self.llm[f"{name}.weight"] + self.config.lora_alpha / self.config.lora_rank * update
            )
        return whole

    def states(self, rows: Sequence[Sequence[int]], *, causal: bool) -> tuple[dict[str, Tensor], Tensor]:
        """The LLM's weights, and its last states [B, T, D] of rows of tokens, padded at their ends."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        real = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows])
        seen = real[:, None, None, :].expand(-1, 1, width, -1)  # every token sees every real one, [B, 1, T, T]
        seen = seen.tril() if causal else seen
        weights, hidden = self.whole(), torch.finfo(torch.float32).min
        inner = {name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")}
        arguments = {"input_ids": ids, "attention_mask": (1 - seen) * hidden, "use_cache": False}
        return weights, functional_call(self.model.model, inner, kwargs=arguments).last_hidden_state

    def vectors(self, texts: Sequence[str], instruction: str) -> Tensor:
        """The texts' vectors [B, D]; of each text its own tokens are pooled, and those around it that are no prompt."""
        config, chat = self.config, self.config.chat_template
        prompt = (HEADER if chat else "") + (f"{instruction}\n" if instruction else "")
        first = len(self.tokenizer(prompt)["input_ids"]) if prompt else 0
        rows = [self.tokenizer(prompt + text)["input_ids"][: config.max_length - chat] for text in texts]
        closing = [self.tokenizer.convert_tokens_to_ids(CLOSING)] if chat else []
        rows = [[*row, *closing] for row in rows]
        _, states = self.states(rows, causal=config.attention == "causal")
        pooled = []
        for state, row in zip(states, rows, strict=True):
            own, places = state[first : len(row)], torch.arange(first, len(row), dtype=torch.float32) + 1
            share = torch.ones_like(places) if config.pooling == "mean" else places
            share = (places == len(row)).float() if config.pooling == "last-token" else share
            pooled.append((share / share.sum()) @ own)
        vectors = torch.stack(pooled)
        for i in range(config.adaptor_layers):
            weight, bias = self.trained[f"adaptor{i}.weight"], self.trained[f"adaptor{i}.bias"]
            vectors = vectors + torch.nn.functional.gelu(vectors @ weight.T + bias)
        return vectors

    def pair_loss(self, batch: Batch) -> Tensor:
        """The loss of pairs: `instruction`, `query`, `positive`, `negative` or None, and `images`, whose they are."""
        columns = ["positive", "negative"] if batch[0]["negative"] is not None else ["positive"]
        texts = [row[column] for column in columns for row in batch]
        owners = [row["images"][column] for column in columns for row in batch]
        queries = self.vectors([row["query"] for row in batch], batch[0]["instruction"])
        found = torch.cat([self.vectors([row[column] for row in batch], "") for column in columns])
        losses = []
        for i, row in enumerate(batch):
            scores = self.config.scale * torch.cosine_similarity(queries[i], found, dim=-1)
            own = {_plain(row["query"]), _plain(row["positive"])}
            same = [_plain(t) in own or o == row["images"]["query"] for t, o in zip(texts, owners, strict=True)]
            keep = [j == i or not (self.config.mask_duplicates and same[j]) for j in range(len(texts))]
            losses.append(scores[keep].logsumexp(0) - scores[i])
        return torch.stack(losses).mean()

    def masked_loss(self, batch: Batch) -> Tensor:
        """The loss of texts with hidden tokens, each predicted from the state of the token before it."""
        weights, states = self.states([row["input_ids"] for row in batch], causal=False)
        losses = []
        for i, row in enumerate(batch):
            for place, token in enumerate(row["labels"]):
                if token != -100:
                    losses.append(-(weights["lm_head.weight"] @ states[i, place - 1]).log_softmax(0)[token])
        return torch.stack(losses).mean()

    def train(self, loss: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> Trace:
        """Take a step on each batch: AdamW, gradients clipped, the rate up to its peak and down to 0."""
        config, steps, trace = self.config, len(batches), Trace()
        warm_up = min(config.warmup_steps, steps // 10)
        if loss == self.pair_loss:  # no vector comes from the output layer
            self.trained.pop("lm_head.weight", None)
            for i in range(config.adaptor_layers):
                width = self.model.config.hidden_size
                self.trained[f"adaptor{i}.weight"] = torch.zeros(width, width)
                self.trained[f"adaptor{i}.bias"] = torch.zeros(width)
        means = {name: torch.zeros_like(w) for name, w in self.trained.items()}
        squares = {name: torch.zeros_like(w) for name, w in self.trained.items()}
        for step, batch in enumerate(batches):
            share = step / warm_up if step < warm_up else (steps - step) / (steps - warm_up)
            rate = config.learning_rate * share
            self.trained = {name: w.detach().requires_grad_() for name, w in self.trained.items()}
            value = loss(batch)
            gradients = dict(zip(self.trained, torch.autograd.grad(value, list(self.trained.values())), strict=True))
            norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
            trace.losses.append(value.item())
            trace.norms.append(norm.item())
            trace.rates.append(rate)
            with torch.no_grad():
                for name, gradient in gradients.items():
                    gradient = gradient * min(1.0, config.max_grad_norm / (norm.item() + 1e-6))
                    means[name] = 0.9 * means[name] + 0.1 * gradient
                    squares[name] = 0.999 * squares[name] + 0.001 * gradient.square()
                    mean, square = means[name] / (1 - 0.9 ** (step + 1)), squares[name] / (1 - 0.999 ** (step + 1))
                    decay = 0.0 if "norm" in name or "bias" in name else config.weight_decay
                    weight = self.trained[name] * (1 - rate * decay)
                    self.trained[name] = weight - rate * mean / (square.sqrt() + 1e-8)
        with torch.no_grad():
            adaptor = {name: w for name, w in self.trained.items() if name.startswith("adaptor")}
            trace.weights = {name: w.detach() for name, w in {**self.whole(), **adaptor}.items()}
        return trace


@functools.cache
def _read(folder: str) -> tuple[Any, Any]:
    """The LLM, none of whose weights is ever changed, and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model, AutoTokenizer.from_pretrained(folder)


def _plain(text: str) -> str:
    """The text without case, punctuation and spacing."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())
