"""Small random checkpoints as the paper's authors laid theirs out, and what those must give, in plain torch.

Nothing of llm2clip, timm or transformers is used for what is expected.

Letters: B images, W tower width, T teacher width, D shared width, G x G patches of P px.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, normalize, scaled_dot_product_attention, silu

T, D, P = 32, 20, 8
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZE = {"openai": 32, "eva02": 24, "siglip2": 24}
"""Pixels a side."""
WIDTH = {"openai": 32, "eva02": 128, "siglip2": 144}
NAMES = {
    "openai": "LLM2CLIP-Openai-B-16",
    "eva02": "LLM2CLIP-EVA02-L-14-336",
    "siglip2": "LLM2CLIP-Llama3.1-8B-siglip2-so400m-patch14-224",
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
OPENAI_CONFIG = {
    "architectures": ["LLM2CLIPModel"],
    "auto_map": {"AutoModel": "modeling_clip.LLM2CLIPModel"},
    "model_type": "clip",
    "projection_dim": D,
    "vision_config": {**VISION, "image_size": 32, "patch_size": P, "model_type": "clip_vision_model"},
}
EVA_CONFIG = {"architectures": ["EvaCLIPModel"], "auto_map": {"AutoModel": "x.EvaCLIPModel"}, "model_type": "clip"}


class Drawn(dict):  # type: ignore[type-arg]
    """Weights that are drawn as they are named."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.source = torch.Generator().manual_seed(seed)

    def draw(self, *shape: int) -> Tensor:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
        return scale * torch.randn(*shape, generator=self.source)

    def linear(self, name: str, rows: int, columns: int, *, bias: bool = True) -> None:
        self[f"{name}.weight"] = 1.5 * self.draw(rows, columns)
        if bias:
            self[f"{name}.bias"] = self.draw(rows)

    def norm(self, name: str, width: int) -> None:
        self[f"{name}.weight"], self[f"{name}.bias"] = 1 + self.draw(width), self.draw(width)


def adaptor(weights: Drawn, start: str, dim: int) -> None:
    for i in range(4):
        weights.norm(f"{start}{i}.ln", T)
        weights.linear(f"{start}{i}.fn.0", 2 * T, T)
        weights.linear(f"{start}{i}.fn.3", T, 2 * T)
    weights.norm(f"{start}4", T)
    weights.linear(f"{start}5", dim, T)
    weights["logit_scale"] = torch.tensor(3.7)


def openai() -> Drawn:
    weights, width, tower = Drawn(), WIDTH["openai"], "vision_model."
    weights[f"{tower}embeddings.class_embedding"] = weights.draw(width)
    weights[f"{tower}embeddings.patch_embedding.weight"] = weights.draw(width, 3, P, P)
    weights[f"{tower}embeddings.position_embedding.weight"] = weights.draw(1 + (32 // P) ** 2, width)
    for name in ("pre_layrnorm", "post_layernorm"):
        weights.norm(tower + name, width)
    for i in range(2):
        block = f"{tower}encoder.layers.{i}."
        for name in ("q", "k", "v", "out"):
            weights.linear(f"{block}self_attn.{name}_proj", width, width)
        for name in ("layer_norm1", "layer_norm2"):
            weights.norm(block + name, width)
        weights.linear(f"{block}mlp.fc1", 64, width)
        weights.linear(f"{block}mlp.fc2", width, 64)
    weights.linear("visual_projection", D, width, bias=False)
    adaptor(weights, "text_adapter.adaptor.", D)
    return weights


def eva02() -> Drawn:
    weights, width, hidden = Drawn(), WIDTH["eva02"], 341
    weights["visual.cls_token"] = weights.draw(1, 1, width)
    weights["visual.pos_embed"] = weights.draw(1, 1 + 9, width)
    weights["visual.patch_embed.proj.weight"] = weights.draw(width, 3, P, P)
    weights["visual.patch_embed.proj.bias"] = weights.draw(width)
    for i in range(2):
        block = f"visual.blocks.{i}."
        for name in ("q", "k", "v"):
            weights.linear(f"{block}attn.{name}_proj", width, width, bias=name != "k")
        weights.linear(f"{block}attn.proj", width, width)
        for name in ("norm1", "norm2", "attn.inner_attn_ln"):
            weights.norm(block + name, width)
        weights.linear(f"{block}mlp.w1", hidden, width)
        weights.linear(f"{block}mlp.w2", hidden, width)
        weights.norm(f"{block}mlp.ffn_ln", hidden)
        weights.linear(f"{block}mlp.w3", width, hidden)
    weights.norm("visual.norm", width)
    weights.linear("visual.head", D, width)
    adaptor(weights, "text.text_adaptor.", D)
    return weights


def siglip2() -> Drawn:
    weights, width, hidden, trunk = Drawn(), WIDTH["siglip2"], 200, "visual.trunk."
    weights[f"{trunk}pos_embed"] = weights.draw(1, 9, width)
    weights[f"{trunk}patch_embed.proj.weight"] = weights.draw(width, 3, P, P)
    weights[f"{trunk}patch_embed.proj.bias"] = weights.draw(width)
    for i in range(2):
        block = f"{trunk}blocks.{i}."
        weights.linear(f"{block}attn.qkv", 3 * width, width)
        weights.linear(f"{block}attn.proj", width, width)
        for name in ("norm1", "norm2"):
            weights.norm(block + name, width)
        weights.linear(f"{block}mlp.fc1", hidden, width)
        weights.linear(f"{block}mlp.fc2", width, hidden)
    weights.norm(f"{trunk}norm", width)
    pool = f"{trunk}attn_pool."
    weights[f"{pool}latent"] = weights.draw(1, 1, width)
    weights.linear(f"{pool}q", width, width)
    weights.linear(f"{pool}kv", 2 * width, width)
    weights.linear(f"{pool}proj", width, width)
    weights.norm(f"{pool}norm", width)
    weights.linear(f"{pool}mlp.fc1", hidden, width)
    weights.linear(f"{pool}mlp.fc2", width, hidden)
    adaptor(weights, "text.text_proj.text_adaptor.", width)
    return weights


def rope_tables() -> tuple[Tensor, Tensor]:
    """Cosines and sines [G*G, 64]: a grid of 16 stretched over G, each frequency for a pair of neighbours."""
    frequencies = 1 / 10000 ** (torch.arange(0, 32, 2) / 32)
    turns = torch.outer(torch.arange(3) / 3 * 16, frequencies).repeat_interleave(2, dim=-1)
    both = torch.cat([turns[:, None].expand(3, 3, 32), turns[None].expand(3, 3, 32)], dim=-1).reshape(9, 64)
    return both.cos(), both.sin()


def turned(x: Tensor) -> Tensor:
    """`x` [..., 1 + G*G, 64] with its positions; the class token has none."""
    first, rest = x[..., :1, :], x[..., 1:, :]
    cosines, sines = rope_tables()
    pairs = rest.unflatten(-1, (-1, 2))
    other = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return torch.cat([first, rest * cosines + other * sines], dim=-2)


def pixels_of(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] as the towers take them."""
    scaled = images.permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


class Oracle:
    """What the weights of a layout give."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def lin(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def ln(self, name: str, x: Tensor, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    def patches(self, name: str, pixels: Tensor) -> Tensor:
        found = torch.nn.functional.conv2d(
            pixels, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"), stride=P
        )
        return found.flatten(2).transpose(1, 2)

    def text(self, vectors: Tensor, start: str, *, unit: bool = True) -> Tensor:
        x = normalize(vectors, dim=-1) if unit else vectors
        for i in range(4):
            block = f"{start}{i}."
            inner = gelu(self.lin(f"{block}fn.0", self.ln(f"{block}ln", x, 1e-5)))
            x = x + self.lin(f"{block}fn.3", inner)
        return normalize(self.lin(f"{start}5", self.ln(f"{start}4", x, 1e-5)), dim=-1)


def heads(x: Tensor, number: int) -> Tensor:
    return x.unflatten(-1, (number, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def image_openai(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    o, tower = Oracle(weights), "vision_model."
    x = o.patches(f"{tower}embeddings.patch_embedding", pixels)
    first = weights[f"{tower}embeddings.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], dim=1) + weights[f"{tower}embeddings.position_embedding.weight"]
    x = o.ln(f"{tower}pre_layrnorm", x, 1e-5)
    for i in range(2):
        block = f"{tower}encoder.layers.{i}."
        y = o.ln(f"{block}layer_norm1", x, 1e-5)
        q, k, v = (heads(o.lin(f"{block}self_attn.{name}_proj", y), 4) for name in "qkv")
        x = x + o.lin(f"{block}self_attn.out_proj", attend(q, k, v))
        y = o.lin(f"{block}mlp.fc1", o.ln(f"{block}layer_norm2", x, 1e-5))
        x = x + o.lin(f"{block}mlp.fc2", y * torch.sigmoid(1.702 * y))
    return normalize(o.lin("visual_projection", o.ln(f"{tower}post_layernorm", x[:, 0], 1e-5)), dim=-1)


def image_eva02(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    o = Oracle(weights)
    x = o.patches("visual.patch_embed.proj", pixels)
    x = torch.cat([weights["visual.cls_token"].expand(len(x), 1, -1), x], dim=1) + weights["visual.pos_embed"]
    for i in range(2):
        block = f"visual.blocks.{i}."
        y = o.ln(f"{block}norm1", x, 1e-6)
        q, k, v = (heads(o.lin(f"{block}attn.{name}_proj", y), 2) for name in "qkv")
        y = o.ln(f"{block}attn.inner_attn_ln", attend(turned(q), turned(k), v), 1e-6)
        x = x + o.lin(f"{block}attn.proj", y)
        y = o.ln(f"{block}norm2", x, 1e-6)
        y = silu(o.lin(f"{block}mlp.w1", y)) * o.lin(f"{block}mlp.w2", y)
        x = x + o.lin(f"{block}mlp.w3", o.ln(f"{block}mlp.ffn_ln", y, 1e-6))
    return normalize(o.lin("visual.head", o.ln("visual.norm", x[:, 0], 1e-6)), dim=-1)


def image_siglip2(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    o, trunk = Oracle(weights), "visual.trunk."
    x = o.patches(f"{trunk}patch_embed.proj", pixels) + weights[f"{trunk}pos_embed"]
    for i in range(2):
        block = f"{trunk}blocks.{i}."
        q, k, v = (heads(part, 2) for part in o.lin(f"{block}attn.qkv", o.ln(f"{block}norm1", x, 1e-6)).chunk(3, -1))
        x = x + o.lin(f"{block}attn.proj", attend(q, k, v))
        x = x + o.lin(f"{block}mlp.fc2", gelu(o.lin(f"{block}mlp.fc1", o.ln(f"{block}norm2", x, 1e-6))))
    x, pool = o.ln(f"{trunk}norm", x, 1e-6), f"{trunk}attn_pool."
    q = heads(o.lin(f"{pool}q", weights[f"{pool}latent"].expand(len(x), 1, -1)), 2)
    k, v = (heads(part, 2) for part in o.lin(f"{pool}kv", x).chunk(2, -1))
    x = o.lin(f"{pool}proj", attend(q, k, v))
    x = x + o.lin(f"{pool}mlp.fc2", gelu(o.lin(f"{pool}mlp.fc1", o.ln(f"{pool}norm", x, 1e-6))))
    return normalize(x[:, 0], dim=-1)


MADE = {"openai": openai, "eva02": eva02, "siglip2": siglip2}
IMAGE = {"openai": image_openai, "eva02": image_eva02, "siglip2": image_siglip2}
STARTS = {
    "openai": "text_adapter.adaptor.",
    "eva02": "text.text_adaptor.",
    "siglip2": "text.text_proj.text_adaptor.",
}


def expected(layout: str, weights: dict[str, Tensor], images: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of uint8 images [B, H, W, 3] and of teacher vectors."""
    text = Oracle(weights).text(vectors, STARTS[layout], unit=layout != "siglip2")
    return IMAGE[layout](weights, pixels_of(images)), text


def write_checkpoint(root: Path, layout: str, weights: Any = None, *, file: str | None = None) -> Path:
    """A folder as the repository of that layout is: weights in its own format, config where there is one."""
    folder = root / NAMES[layout]
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(MADE[layout]()) if weights is None else weights
    file = file or {"openai": "model.safetensors"}.get(layout, f"{NAMES[layout]}.pt")
    if file.endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in weights.items()}, folder / file, {"format": "pt"})
    else:
        torch.save(weights, folder / file)
    config = {"openai": OPENAI_CONFIG, "eva02": EVA_CONFIG}.get(layout)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
