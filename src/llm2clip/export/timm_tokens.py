"""A timm ViT (EVA02, SigLIP, ...) whose hidden states are tokens [B, N, W], class token first, as a LLaVA reads them.

transformers' own wrapper gives maps [B, W, h, w] without class token. Importing this file makes AutoModel know the
class. It needs no llm2clip: a copy lies beside a LLaVA's weights, where `trust_remote_code=True` finds it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, LlavaConfig, TimmWrapperConfig, TimmWrapperModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

__all__ = ["LlavaConfig", "TimmTokensConfig", "TimmTokensModel"]  # the first is what a LLaVA's config.json asks for


class TimmTokensConfig(TimmWrapperConfig):
    """As transformers' own of timm models, with what a LLaVA asks a tower's config for."""

    model_type = "timm_tokens"

    hidden_size: int = 0
    """W."""
    image_size: int = 0
    """Side in pixels."""
    patch_size: int = 0
    """Side in pixels."""
    num_hidden_layers: int = 0


class TimmTokensModel(TimmWrapperModel):
    """A timm ViT that gives all tokens of all blocks; its weights have the names they have in transformers' wrapper."""

    config: TimmTokensConfig
    config_class = TimmTokensConfig

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """What follows each block, before the last norm: `hidden_states`, one [B, N, W] a block.

        Args:
            pixel_values: normalised images [B, 3, H, W].
        """
        last, states = self.timm_model.forward_intermediates(
            pixel_values.to(self.dtype),
            output_fmt="NLC",
            return_prefix_tokens=self.timm_model.num_prefix_tokens > 0,
        )
        tokens = [torch.cat([state[1], state[0]], dim=1) if isinstance(state, tuple) else state for state in states]
        return BaseModelOutputWithPooling(last_hidden_state=last, hidden_states=tuple(tokens))


def token_facts(tower: Any, *, image_size: int) -> dict[str, int]:
    """What `TimmTokensConfig` has beside a `TimmWrapperModel`'s own config; {} if that is no ViT.

    Args:
        image_size: side in pixels that it is made for.
    """
    inner = tower.timm_model
    if not hasattr(inner, "blocks") or not hasattr(inner, "num_prefix_tokens"):
        return {}
    sizes = {"hidden_size": inner.embed_dim, "patch_size": inner.patch_embed.patch_size[0]}
    return {**sizes, "image_size": image_size, "num_hidden_layers": len(inner.blocks)}


def with_tokens(tower: Any, *, image_size: int) -> TimmTokensModel:
    """The same tower, a `TimmWrapperModel`, as one of tokens.

    Args:
        image_size: side in pixels that it is made for.

    Raises:
        ValueError: if it is no ViT.
    """
    facts = token_facts(tower, image_size=image_size)
    if not facts:
        raise ValueError(f"timm's {tower.config.architecture} gives maps, no tokens; take a ViT (EVA02, SigLIP, CLIP)")
    given = {**tower.config.to_dict(), "model_type": TimmTokensConfig.model_type}
    model = TimmTokensModel(TimmTokensConfig.from_dict({**given, **facts}))
    model.load_state_dict(tower.state_dict())
    return model.to(tower.dtype).eval()


AutoConfig.register(TimmTokensConfig.model_type, TimmTokensConfig, exist_ok=True)
AutoModel.register(TimmTokensConfig, TimmTokensModel, exist_ok=True)
