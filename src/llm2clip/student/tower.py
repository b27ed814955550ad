"""Vision towers: one pooled vector [B, W] from any `transformers` vision model, and what the families differ in.

Letters: B pictures, N tokens, W tower width.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel

POOLINGS: dict[str, Callable[[Any], Tensor]] = {
    "pooler": lambda outputs: outputs.pooler_output.flatten(1),
    "cls": lambda outputs: outputs.last_hidden_state[:, 0],
    "mean": lambda outputs: outputs.last_hidden_state.mean(dim=1),
}
"""How one vector [B, W] a picture is read off what a tower gives: the family's own, the normed class token, the mean
of all tokens."""


def _timm_image_size(config: Any) -> Any:
    trained = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
    return (config.model_args or {}).get("img_size", trained)


def _set_timm_image_size(config: Any, image_size: int) -> None:
    config.model_args = {**(config.model_args or {}), "img_size": image_size}


class Family(NamedTuple):
    """In what a family of towers is unlike most."""

    pooling: str = "pooler"
    """One of `POOLINGS`."""
    image_size: Callable[[Any], Any] = lambda config: getattr(config, "image_size", None)
    """What the config says of the side in pixels: a number, the last of several, or None."""
    set_image_size: Callable[[Any, int], None] = lambda config, image_size: setattr(config, "image_size", image_size)
    drops_patches: bool = True
    """False where positions lie beside the tokens (rotary), so that dropping some would mix them up."""
    refused: str = ""
    """What it is, and which to take in its place, if it cannot be a student's tower."""


# Their pooler is an extra layer that self-supervised checkpoints leave random: take the normed class token instead.
_CLASS_TOKEN = ("vit", "deit", "vit_msn", "vit_mae", "beit", "ijepa")
_NAFLEX = (
    "a SigLIP2 of variable resolution (NaFlex); take one of fixed resolution, such as google/siglip2-so400m-patch14-224"
)
FAMILIES = {
    **dict.fromkeys(_CLASS_TOKEN, Family(pooling="cls")),
    "timm_wrapper": Family(image_size=_timm_image_size, set_image_size=_set_timm_image_size),
    **dict.fromkeys(("dinov3_vit", "dinov3_convnext"), Family(drops_patches=False)),
    **dict.fromkeys(("siglip2", "siglip2_vision_model"), Family(refused=_NAFLEX)),
}
"""The odd ones by their `model_type`; every other vision model of transformers is a plain `Family()`."""


def family_of(config: Any) -> Family:
    """The family of a tower's config."""
    return FAMILIES.get(config.model_type, Family())


def build_tower(config: Any, *, pooling: str) -> Any:
    """A tower of random weights for `config`, without layers that `pooling` leaves unused."""
    return prune_tower(AutoModel.from_config(config), pooling=pooling)


def prune_tower(tower: Any, *, pooling: str) -> Any:
    """`tower` without a pooler that `pooling` does not read: a layer without gradient stops data-parallel training."""
    if pooling != "pooler" and isinstance(getattr(tower, "pooler", None), nn.Module):
        tower.pooler = None
    if pooling != "pooler" and isinstance(getattr(tower, "head", None), nn.Module) and hasattr(tower, "use_head"):
        tower.head, tower.use_head = None, False
    return tower


def load_options(tower_class: Any, pooling: str) -> dict[str, bool]:
    """What `from_pretrained` needs, so that a pooler that was never trained is not made up at random."""
    takes = inspect.signature(tower_class.__init__).parameters
    return {"add_pooling_layer": False} if pooling != "pooler" and "add_pooling_layer" in takes else {}


def pooled_output(tower: nn.Module, pixel_values: Tensor, *, pooling: str) -> Tensor:
    """One vector [B, W] a picture.

    Args:
        pixel_values: normalised pictures [B, 3, H, W].
        pooling: one of `POOLINGS`.
    """
    return POOLINGS[pooling](tower(pixel_values=pixel_values))


def tower_width(tower: nn.Module, *, image_size: int, pooling: str) -> int:
    """W, found by showing the tower one black picture.

    Raises:
        ValueError: if the tower gives no pooled vector or wants other inputs than pictures.
    """
    was_training = tower.training
    tower.eval()
    try:
        with torch.no_grad():
            pooled = pooled_output(tower, torch.zeros(1, 3, image_size, image_size), pooling=pooling)
    except (TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]  # this file is copied: no errors.one_line
        raise ValueError(f"it gives no pooled vector for a {image_size} px picture ({reason.strip()})") from None
    finally:
        tower.train(was_training)
    return pooled.shape[-1]


def native_image_size(config: Any) -> int | None:
    """The side in pixels that `config` was trained for, or None if it does not say."""
    size = family_of(config).image_size(config)
    return size[-1] if isinstance(size, (list, tuple)) else size


def resize_tower(tower: Any, *, image_size: int) -> Any:
    """`tower` for pictures of `image_size` px: position tables interpolated once, the rest as it was.

    Raises:
        ValueError: if the size is no multiple of the patch size.
    """
    config = copy.deepcopy(tower.config)
    family_of(config).set_image_size(config, image_size)
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int) and image_size % patch:
        low = image_size // patch * patch
        fitting = f"{low} or {low + patch}" if low else str(patch)
        raise ValueError(f"image_size {image_size} is no multiple of the patch size {patch}; use {fitting}")
    resized = AutoModel.from_config(config)
    if getattr(tower, "pooler", 0) is None:
        resized.pooler = None
    state, wanted = tower.state_dict(), resized.state_dict()
    resized.load_state_dict({name: resample_positions(state[name], value.shape) for name, value in wanted.items()})
    return resized.to(tower.dtype)


def resample_positions(table: Tensor, shape: torch.Size) -> Tensor:
    """A position table [..., N, W] resampled to `shape` by bicubic interpolation; tokens before the grid are kept.

    >>> resample_positions(torch.zeros(1, 1 + 16, 8), torch.Size([1, 1 + 36, 8])).shape
    torch.Size([1, 37, 8])
    """
    if table.shape == shape:
        return table
    old, new, width = table.shape[-2], shape[-2], shape[-1]
    prefix = next(n for n in range(old) if math.isqrt(old - n) ** 2 == old - n and math.isqrt(new - n) ** 2 == new - n)
    flat = table.reshape(old, width).float()
    side, new_side = math.isqrt(old - prefix), math.isqrt(new - prefix)
    grid = flat[prefix:].reshape(1, side, side, width).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(new_side, new_side), mode="bicubic", antialias=True)
    grid = grid.permute(0, 2, 3, 1).reshape(new_side * new_side, width)
    return torch.cat([flat[:prefix], grid]).reshape(shape).to(table.dtype)


def tower_blocks(tower: nn.Module) -> list[tuple[str, nn.Module]]:
    """The tower's transformer blocks with their names, first to last: its longest list of equal layers."""
    lists = [
        (name, module)
        for name, module in tower.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(part) for part in module}) == 1
    ]
    name, blocks = max(lists, key=lambda pair: len(pair[1]), default=("", nn.ModuleList()))
    return [(f"{name}.{i}", block) for i, block in enumerate(blocks)]


def checkpoint_activations(tower: Any) -> None:
    """Make `tower` compute its activations anew in the backward pass, which holds fewer of them at a time."""
    # transformers >= 5.20 calls it so, and warns at the older name
    enable = getattr(tower, "activation_checkpointing_enable", None) or tower.gradient_checkpointing_enable
    enable({"use_reentrant": False})


class PatchDropout(nn.Module):
    """Keeps a random part of each picture's patch tokens while training (FLIP, arXiv 2212.00794); all in evaluation.

    Args:
        rate: the part dropped, 0 to 1.
        num_prefix_tokens: class and register tokens before the patches, always kept.
        with_places: give the places of the kept patches too, for a tower that has to find their rotary positions.
    """

    def __init__(self, rate: float, *, num_prefix_tokens: int, with_places: bool = False) -> None:
        super().__init__()
        self.rate, self.num_prefix_tokens, self.with_places = rate, num_prefix_tokens, with_places

    def forward(self, tokens: Tensor) -> Any:
        """Tokens [B, N, W] with max(1, (1 - rate) x patches) of the patches, in their order."""
        if not self.training:
            return (tokens, None) if self.with_places else tokens
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        num_kept = max(1, round(patches.shape[1] * (1 - self.rate)))
        order = torch.rand(patches.shape[:2], device=tokens.device).argsort(dim=1)
        places = order[:, :num_kept].sort(dim=1).values
        kept = patches.gather(1, places.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
        tokens = torch.cat([prefix, kept], dim=1)
        return (tokens, places) if self.with_places else tokens


def add_patch_dropout(tower: Any, *, rate: float, image_size: int) -> None:
    """Make `tower` drop patches while it trains.

    Raises:
        ValueError: if the family keeps positions beside its tokens (rotary), so that dropping would mix them up.
    """
    inner: Any = getattr(tower, "timm_model", None)
    if hasattr(inner, "patch_drop"):  # timm's ViT and EVA drop patches themselves, EVA with their rotary positions
        inner.patch_drop = PatchDropout(
            rate, num_prefix_tokens=inner.num_prefix_tokens, with_places=hasattr(inner, "rope")
        )
        return
    embeddings = getattr(tower, "embeddings", None)
    patch = getattr(tower.config, "patch_size", None)
    if not family_of(tower.config).drops_patches or embeddings is None or not isinstance(patch, int):
        raise ValueError(f"patch_dropout does not work for {tower.config.model_type} towers; leave it at 0")
    with torch.no_grad():
        num_tokens = embeddings(torch.zeros(1, 3, image_size, image_size)).shape[1]
    drop = PatchDropout(rate, num_prefix_tokens=num_tokens - (image_size // patch) ** 2)
    embeddings.register_forward_hook(lambda module, args, tokens: drop.train(module.training)(tokens))
