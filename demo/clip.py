"""The mini CLIP: made, trained, and what the arms B and B-long do: fine-tune it with its own text encoder.

Letters: B images of a batch, L tokens, D shared width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2clip.progress import Progress
from llm2clip.student.loss import contrastive_loss
from llm2clip.student.muon import Muon

CONTEXT = 128
"""Positions of the text encoder; arm B reads 32 of them."""
MEAN, STD = 0.45, 0.27


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Images and their captions' tokens in memory.

    Attributes:
        pixels: uint8 `[N, 3, 64, 64]`.
        captions: for each image, kind -> its captions' token ids.
    """

    pixels: Tensor
    captions: Sequence[Mapping[str, Sequence[list[int]]]]


@dataclass(frozen=True, kw_only=True)
class ClipTraining:
    """How the mini CLIP is trained; rates are peaks, reached linearly and left along a cosine."""

    steps: int
    batch_size: int = 128
    context: int = 32
    muon_rate: float = 0.02
    adam_rate: float = 1e-3
    warmup_steps: int = 20
    seed: int = 0


def new_clip(vocab_size: int, *, seed: int, width: int = 128) -> Any:
    """A CLIP of random weights for 64-pixel images and our tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    shared = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={
            **shared,
            "num_hidden_layers": 2,
            "vocab_size": vocab_size,
            "max_position_embeddings": CONTEXT,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 3,
        },
        vision_config={**shared, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16},
        projection_dim=width,
    )
    return CLIPModel(config)


def normalised(pixels: Tensor) -> Tensor:
    """uint8 pixels as the towers want them, float `[B, 3, 64, 64]`."""
    return (pixels.float() / 255 - MEAN) / STD


def padded(ids: Sequence[list[int]], *, context: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask `[B, L]`; what is longer than `context` is cut but keeps its closing token."""
    cut = [one if len(one) <= context else [*one[: context - 1], one[-1]] for one in ids]
    length = max(map(len, cut))
    tokens = torch.tensor([one + [0] * (length - len(one)) for one in cut])
    return tokens, torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in cut])


def batches(pairs: Pairs, training: ClipTraining, mix: Mapping[str, float]) -> Iterator[tuple[Tensor, list[list[int]]]]:
    """Images `[B, 3, 64, 64]` and one caption of each, its kind drawn by `mix`; a new order in each pass."""
    random, generator = Random(f"clip/{training.seed}"), np.random.default_rng(training.seed)
    kinds, weights = list(mix), list(mix.values())
    while True:
        order = generator.permutation(len(pairs.pixels))
        for start in range(0, len(order) - training.batch_size + 1, training.batch_size):
            rows = order[start : start + training.batch_size]
            chosen = [random.choice(pairs.captions[row][random.choices(kinds, weights)[0]]) for row in rows]
            yield pairs.pixels[torch.from_numpy(rows)], chosen


def image_vectors(clip: Any, pixels: Tensor) -> Tensor:
    """Unit vectors `[B, D]` of uint8 images."""
    pooled = clip.vision_model(pixel_values=normalised(pixels)).pooler_output
    return torch.nn.functional.normalize(clip.visual_projection(pooled), dim=-1)


def text_vectors(clip: Any, ids: Sequence[list[int]], *, context: int) -> Tensor:
    """Unit vectors `[B, D]` of captions given as token ids."""
    tokens, mask = padded(ids, context=context)
    pooled = clip.text_model(input_ids=tokens, attention_mask=mask).pooler_output
    return torch.nn.functional.normalize(clip.text_projection(pooled), dim=-1)


def train_clip(
    clip: Any, pairs: Pairs, training: ClipTraining, *, mix: Mapping[str, float], description: str
) -> list[dict[str, float]]:
    """Train all of `clip` on the pairs with the students' loss; returns the log, a line every ten steps."""
    clip.train()
    optimizers = _optimizers(clip, training)
    log: list[dict[str, float]] = []
    start = time.monotonic()
    with Progress(training.steps, description=description, unit="steps") as progress:
        for step, (pixels, ids) in zip(range(training.steps), batches(pairs, training, mix), strict=False):
            _set_rates(optimizers, step, training)
            scale = clip.logit_scale.exp()
            loss = contrastive_loss(
                image_vectors(clip, pixels), text_vectors(clip, ids, context=training.context), scale
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(clip.parameters(), 5.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                clip.logit_scale.clamp_(0, np.log(100))
            progress.advance(note=f"loss {loss.item():.3f}")
            if step % 10 == 9 or step + 1 == training.steps:
                log.append({"step": step + 1, "loss": loss.item(), "seconds": round(time.monotonic() - start, 2)})
    clip.eval()
    return log


def _optimizers(clip: Any, training: ClipTraining) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, projections, vectors and the scale."""
    hidden = [p for name, p in clip.named_parameters() if p.ndim == 2 and ".layers." in name]
    known = {id(p) for p in hidden}
    rest = [p for p in clip.parameters() if id(p) not in known]
    return [
        Muon(hidden, lr=training.muon_rate, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=training.adam_rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def _set_rates(optimizers: list[torch.optim.Optimizer], step: int, training: ClipTraining) -> None:
    rise = min(1.0, (step + 1) / max(1, training.warmup_steps))
    fall = 0.5 * (1 + np.cos(np.pi * step / training.steps))
    for optimizer, peak in zip(optimizers, (training.muon_rate, training.adam_rate), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * rise * fall
