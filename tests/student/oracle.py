"""A student's training in plain PyTorch, written from what the documentation says: what the product's runs must do.

It shares no code with the product's step, loss, optimizer, schedule, average or choice of what learns. Weights are
those of a `Student`; the tower is transformers' own model. One process; names of weights are those of CLIP's tower.

Letters: B images, m captions each, M = B * m.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

MAX_SCALE = 100.0


class Oracle:
    """One run.

    Args:
        student: of the weights that the run starts from; it is not changed.
        config: the run's `StudentConfig`.
        total_steps: optimizer steps in all.
        adapters: first weights of LoRA by name, `tower.LAYER.lora_A` and `tower.LAYER.lora_B`.
    """

    def __init__(self, student: Any, config: Any, total_steps: int, adapters: Mapping[str, Tensor]) -> None:
        self.tower, self.config, self.total_steps = student.train().tower, config, total_steps
        self.pixel_mean, self.pixel_std = student.pixel_mean, student.pixel_std
        self.blocks = max((depth(name) for name, _ in student.named_parameters() if ".layers." in name), default=0)
        named = {**dict(student.named_parameters()), **adapters}
        self.weights = {name: value.detach().clone().requires_grad_() for name, value in named.items()}
        self.averages = {name: value.detach().clone() for name, value in named.items()}
        self.state: dict[str, dict[str, Any]] = {}
        self.done = 0

    def step(self, batches: list[Any]) -> dict[str, Any]:
        """Take a step; what the log has of it, the `rates` of weights, and `unclamped`, the scale before its bounds."""
        config = self.config
        torch.manual_seed(int(np.random.SeedSequence([config.seed, self.done, 0]).generate_state(1)[0]))
        learning = [name for name in self.weights if self.learns(name)]
        losses, gradients = [], dict.fromkeys(learning, 0.0)
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                image, text = self.image(batch.pixels), self.text(batch.text_embeds)
            image, text = (functional.normalize(vectors.float(), dim=-1) for vectors in (image, text))
            scale = self.weights["logit_scale"].exp()
            loss = self.loss(scale * image @ text.T, batch)
            found = torch.autograd.grad(loss, [self.weights[name] for name in learning], allow_unused=True)
            for name, gradient in zip(learning, found, strict=True):
                if gradient is not None:
                    gradients[name] = gradients[name] + gradient / len(batches)
            losses.append(loss.item())
        gradients = {name: value for name, value in gradients.items() if isinstance(value, Tensor)}
        norm = math.sqrt(sum(value.double().square().sum().item() for value in gradients.values()))
        shrink = min(1.0, config.max_grad_norm / norm)
        rates = {name: self.rate(name) * self.schedule() for name in self.weights}
        with torch.no_grad():
            for name, gradient in gradients.items():
                self.move(name, gradient * shrink, rates[name])
            unclamped = self.weights["logit_scale"].exp().item()
            self.weights["logit_scale"].clamp_(0, math.log(MAX_SCALE))
            self.average()
        self.done += 1
        return {
            "loss": sum(losses) / len(losses),
            "grad_norm": norm,
            "scale": scale.item(),
            **accuracy_bounds(image @ text.T),
            "rates": rates,
            "unclamped": unclamped,
        }

    def saved(self) -> dict[str, Tensor]:
        """The weights that a finished run leaves: adapters are in the tower's weights."""
        values = self.averages if self.config.ema else self.weights
        return {name: value.detach() for name, value in self.merged(values).items() if ".lora_" not in name}

    # what the vectors are

    def image(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 [B, 3, H, W] to vectors [B, D]."""
        pixels = (pixels - self.pixel_mean) / self.pixel_std
        weights = self.merged(self.weights)
        tower = {name.removeprefix("tower."): value for name, value in weights.items() if name.startswith("tower.")}
        inputs = {"pixel_values": pixels}
        hooks = [self.tower.embeddings.register_forward_hook(self.drop_patches)] if self.config.patch_dropout else []
        outputs = torch.func.functional_call(self.tower, tower, (), inputs)
        for hook in hooks:
            hook.remove()
        vit = self.tower.config.model_type == "vit"  # its pooler is often untrained
        pooled = outputs.last_hidden_state[:, 0] if vit else outputs.pooler_output.flatten(1)
        return functional.linear(pooled, weights["visual_projection.weight"])

    def drop_patches(self, module: Any, args: Any, tokens: Tensor) -> Tensor:
        """The class token and a random part of the patches [B, 1 + P, W], in their order; drawn by micro-batch."""
        count, width = tokens.shape[1] - 1, tokens.shape[2]
        sizes = [len(part) for part in tokens.split(self.config.micro_batch_size or len(tokens))]
        draws = torch.cat([torch.rand(size, count) for size in sizes])
        kept = draws.argsort(dim=1)[:, : round(count * (1 - self.config.patch_dropout))].sort(dim=1).values
        return torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, kept[:, :, None].expand(-1, -1, width))], dim=1)

    def text(self, embeds: Tensor) -> Tensor:
        """Teacher vectors [M, T] to vectors [M, D]: the adaptor of the paper."""
        own = {name: value for name, value in self.weights.items() if name.startswith("adaptor.")}

        def layer(x: Tensor, name: str) -> Tensor:
            return functional.linear(x, own[f"adaptor.{name}.weight"], own[f"adaptor.{name}.bias"])

        def norm(x: Tensor, name: str) -> Tensor:
            return functional.layer_norm(x, x.shape[-1:], own[f"adaptor.{name}.weight"], own[f"adaptor.{name}.bias"])

        x = functional.normalize(embeds.float(), dim=-1)
        for i in range(self.config.adaptor_blocks):
            inner = layer(norm(x, f"blocks.{i}.norm"), f"blocks.{i}.expand")
            x = x + layer(functional.gelu(inner), f"blocks.{i}.shrink")
        return layer(norm(x, "norm"), "projection")

    def merged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`weights` with each LoRA pair's product added: W + alpha / rank * B @ A."""
        result = dict(weights)
        for name in weights:
            if name.endswith(".lora_A"):
                layer = name.removesuffix(".lora_A")
                pair = weights[f"{layer}.lora_B"] @ weights[name]
                result[f"{layer}.weight"] = (
                    weights[f"{layer}.weight"] + self.config.lora_alpha / self.config.lora_rank * pair
                )
        return result

    # what is right and wrong

    def loss(self, scores: Tensor, batch: Any) -> Tensor:
        """The loss [] of scores [B, M]; an equal caption of another image is neither right nor wrong."""
        config, (num_images, num_captions) = self.config, scores.shape
        each = num_captions // num_images
        own = torch.arange(num_captions) // each == torch.arange(num_images)[:, None]
        rows = batch.rows.view(num_images, each)
        left_out = (rows[:, :, None] == batch.rows).any(dim=1) & ~own
        if config.loss == "sigmoid":
            wrongness = torch.where(own, -1.0, 1.0) * (scores + self.weights["logit_bias"])
            return functional.softplus(wrongness)[~left_out].sum() / num_captions
        scores = scores.masked_fill(left_out, -math.inf)
        parts = []
        for dim in (1, 0):  # image among captions, caption among images
            hard, even = (w / w.sum(dim=dim, keepdim=True) for w in (own.float(), (~left_out).float()))
            target = hard * (1 - config.label_smoothing) + even * config.label_smoothing
            parts.append(-(target * scores.log_softmax(dim=dim).masked_fill(left_out, 0)).sum(dim=dim).mean())
        return (parts[0] + parts[1]) / 2

    # how weights move

    def learns(self, name: str) -> bool:
        """Whether a weight learns in this step."""
        if not name.startswith("tower."):
            return True
        if self.done < self.config.adaptor_warmup_steps:
            return False
        if self.config.lora_rank:
            return ".lora_" in name
        unlocked = self.config.unlocked_blocks
        return unlocked is None or (unlocked > 0 and depth(name, self.blocks) > self.blocks - unlocked)

    def rate(self, name: str) -> float:
        """The peak rate: each block of the tower is slower than the next, what follows the last one is not slower."""
        if not name.startswith("tower."):
            return self.config.adaptor_learning_rate
        return self.config.learning_rate * self.config.layer_decay ** (self.blocks + 1 - depth(name, self.blocks))

    def schedule(self) -> float:
        """What multiplies the peak rates: a linear rise to 1, then half a cosine down to 0."""
        warmup = self.config.warmup_steps
        if self.done < warmup:
            return (self.done + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (self.done - warmup) / (self.total_steps - warmup))

    def move(self, name: str, gradient: Tensor, rate: float) -> None:
        """AdamW (arXiv 1711.05101), or Muon (arXiv 2502.16982) for matrices in the blocks; no decay but of matrices."""
        weight, state = self.weights[name], self.state.setdefault(name, {"t": 0, "m": 0.0, "v": 0.0})
        matrix = weight.ndim >= 2 and not any(word in name for word in ("position", "token", "probe"))
        weight.mul_(1 - rate * self.config.weight_decay * matrix)
        if self.config.optimizer == "muon" and matrix and ("layers." in name or "adaptor.blocks." in name):
            state["m"] = 0.95 * state["m"] + 0.05 * gradient
            update = orthogonal(0.05 * gradient + 0.95 * state["m"])
            weight.sub_(update * rate * 0.2 * math.sqrt(max(weight.shape)))
            return
        state["t"] += 1
        state["m"] = 0.9 * state["m"] + 0.1 * gradient
        state["v"] = 0.999 * state["v"] + 0.001 * gradient.square()
        mean, square = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.999 ** state["t"])
        weight.sub_(rate * mean / (square.sqrt() + 1e-8))

    def average(self) -> None:
        """The running average follows; its first steps weigh more, as it starts from random weights."""
        decay = min(self.config.ema, (1 + self.done) / (10 + self.done))
        for name, value in self.averages.items():
            value.copy_(decay * value + (1 - decay) * self.weights[name])


def depth(name: str, blocks: int = 10**6) -> int:
    """0 for what comes before the tower's blocks, 1 for the first block, `blocks` + 1 for what follows the last."""
    if ".layers." in name:
        return 1 + int(name.partition(".layers.")[2].partition(".")[0])
    return blocks + 1 if "post_layernorm" in name else 0


def orthogonal(matrix: Tensor) -> Tensor:
    """Five steps of Newton-Schulz in float32, with the coefficients of Muon's author."""
    x = matrix.float()
    x = x.T if len(matrix) > matrix.shape[1] else x
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.T if len(matrix) > matrix.shape[1] else x


def accuracy_bounds(cosines: Tensor) -> dict[str, float]:
    """The part of images whose own caption is nearest, if ties (two images with equal captions) are lost, or won."""
    each = cosines.shape[1] // len(cosines)
    own = torch.arange(cosines.shape[1]) // each == torch.arange(len(cosines))[:, None]
    lead = cosines.masked_fill(~own, -2).amax(dim=1) - cosines.masked_fill(own, -2).amax(dim=1)
    return {
        "accuracy_least": (lead > 1e-6).float().mean().item(),
        "accuracy_most": (lead > -1e-6).float().mean().item(),
    }
