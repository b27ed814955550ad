"""Vision towers: one pooled vector [B, W] from any `transformers` vision model, and what the families differ in.

Letters: B images, N tokens, W tower width.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel

POOLINGS: dict[str, Callable[[Any], Tensor]] = {
    "pooler": lambda outputs: outputs.pooler_output.flatten(1),
    "cls": lambda outputs: outputs.last_hidden_state[:, 0],
    "mean": lambda outputs: _mean(outputs.last_hidden_state),
}
"""How one vector [B, W] an image is read off what a tower gives: the family's own, the normed class token, the mean
of all tokens or places."""


def _mean(hidden: Tensor) -> Tensor:
    """The mean of tokens [B, N, W], or of the places of a map [B, W, H, W]."""
    return hidden.flatten(2).mean(dim=2) if hidden.ndim == 4 else hidden.mean(dim=1)


def _timm_image_size(config: Any) -> Any:
    trained = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
    return (config.model_args or {}).get("img_size", trained)


def _siglip_pooling(config: Any) -> str:
    return "pooler" if getattr(config, "vision_use_head", True) else "mean"  # as its classifier takes it


def _show_all(config: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """All patches in their order, in the place of random numbers that say which are seen."""
    num_patches = (pixel_values.shape[-2] // config.patch_size) * (pixel_values.shape[-1] // config.patch_size)
    places = torch.arange(num_patches, device=pixel_values.device, dtype=torch.float32)
    return {"noise": places.expand(len(pixel_values), -1)}


def _set_timm_image_size(config: Any, image_size: int) -> None:
    config.model_args = {**(config.model_args or {}), "img_size": image_size}


class Family(NamedTuple):
    """In what a family of towers is unlike most."""

    pooling: Callable[[Any], str] = lambda config: "pooler"
    """Which of `POOLINGS` suits a config."""
    image_size: Callable[[Any], Any] = lambda config: getattr(config, "image_size", None)
    """What the config says of the side in pixels: a number, the last of several, or None."""
    set_image_size: Callable[[Any, int], None] = lambda config, image_size: setattr(config, "image_size", image_size)
    drops_patches: bool = True
    """False where positions lie beside the tokens (rotary), so that dropping some would mix them up."""
    in_use: tuple[tuple[str, Any], ...] = ()
    """Settings that training by itself needs and use does not, with their values in use."""
    inputs: Callable[[Any, Tensor], dict[str, Tensor]] = lambda config, pixel_values: {}
    """What it takes beside the images."""
    refused: str = ""
    """What it is, and which to take in its place, if it cannot be a student's tower."""


# Their pooler is an extra layer that self-supervised checkpoints leave random, or they have none: their classifiers
# take the normed class token, or the mean.
_CLASS_TOKEN = ("vit", "deit", "vit_msn", "pvt")
_MEAN = ("ijepa", "segformer", "pvt_v2")  # I-JEPA has no class token
_NAFLEX = (
    "a SigLIP2 of variable resolution (NaFlex); take one of fixed resolution, such as google/siglip2-so400m-patch14-224"
)
FAMILIES = {
    **dict.fromkeys(_CLASS_TOKEN, Family(pooling=lambda config: "cls")),
    **dict.fromkeys(_MEAN, Family(pooling=lambda config: "mean")),
    "vit_mae": Family(
        pooling=lambda config: "cls", drops_patches=False, in_use=(("mask_ratio", 0.0),), inputs=_show_all
    ),
    "siglip_vision_model": Family(pooling=_siglip_pooling),
    "timm_wrapper": Family(image_size=_timm_image_size, set_image_size=_set_timm_image_size),
    **dict.fromkeys(("dinov3_vit", "dinov3_convnext"), Family(drops_patches=False)),
    **dict.fromkeys(("siglip2", "siglip2_vision_model"), Family(refused=_NAFLEX)),
}
"""The odd ones by their `model_type`; every other vision model of transformers is a plain `Family()`."""


def family_of(config: Any) -> Family:
    """The family of a tower's config."""
    return FAMILIES.get(config.model_type, Family())


def default_pooling(config: Any) -> str:
    """Which of `POOLINGS` a tower has by default."""
    return family_of(config).pooling(config)


def find_class(config: Any) -> Any:
    """The class of a tower's config, or None; AutoModel knows it from then on.

    transformers has vision halves that it lists for AutoModel only as part of the whole model.
    """
    if MODEL_MAPPING.get(type(config), None) is None:
        found = getattr(transformers, type(config).__name__.removesuffix("Config") + "Model", None)
        if found is not None and found.config_class is type(config):
            AutoModel.register(type(config), found, exist_ok=True)
    return MODEL_MAPPING.get(type(config), None)


def build_options(config: Any, *, pooling: str) -> dict[str, bool]:
    """Settle `config` for use; what its class must be told to have the pooler that `pooling` reads."""
    for name, value in family_of(config).in_use:
        setattr(config, name, value)
    takes = inspect.signature(find_class(config).__init__).parameters
    return {"add_pooling_layer": True} if pooling == "pooler" and "add_pooling_layer" in takes else {}


def build_tower(config: Any, *, pooling: str) -> Any:
    """A tower of random weights for `config`, without layers that `pooling` leaves unused."""
    options = build_options(config, pooling=pooling)
    return prune_tower(AutoModel.from_config(config, **options), pooling=pooling)


def prune_tower(tower: Any, *, pooling: str) -> Any:
    """`tower` without a pooler that `pooling` does not read: a layer without gradient stops data-parallel training."""
    if pooling != "pooler" and isinstance(getattr(tower, "pooler", None), nn.Module):
        tower.pooler = None
    if pooling != "pooler" and isinstance(getattr(tower, "head", None), nn.Module) and hasattr(tower, "use_head"):
        tower.head, tower.use_head = None, False
    return tower


def load_options(tower_class: Any, pooling: str) -> dict[str, bool]:
    """What `from_pretrained` needs, so that there is a pooler if it is read, and none made up at random if not."""
    option = inspect.signature(tower_class.__init__).parameters.get("add_pooling_layer")
    wanted = pooling == "pooler"
    return {} if option is None or option.default is wanted else {"add_pooling_layer": wanted}


def pooled_output(tower: nn.Module, pixel_values: Tensor, *, pooling: str) -> Tensor:
    """One vector [B, W] an image.

    Args:
        pixel_values: normalised images [B, 3, H, W].
        pooling: one of `POOLINGS`.
    """
    config = getattr(tower, "config", None)
    inputs = {} if config is None else family_of(config).inputs(config, pixel_values)
    return POOLINGS[pooling](tower(pixel_values=pixel_values, **inputs))


def tower_width(tower: nn.Module, *, image_size: int, pooling: str) -> int:
    """W, found by showing the tower one image, twice.

    Raises:
        ValueError: if the tower gives no pooled vector, wants other inputs than images, or gives another vector the
            second time.
    """
    was_training = tower.training
    tower.eval()
    image = torch.linspace(-1, 1, 3 * image_size**2).view(1, 3, image_size, image_size)
    try:
        with torch.no_grad():
            pooled, again = (pooled_output(tower, image, pooling=pooling) for _ in range(2))
    except (TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]  # this file is copied: no errors.one_line
        raise ValueError(f"it gives no pooled vector for a {image_size} px image ({reason.strip()})") from None
    finally:
        tower.train(was_training)
    if pooled.ndim != 2:
        raise ValueError(f"it gives no pooled vector, but numbers of the shape {list(pooled.shape[1:])} an image")
    if not torch.allclose(pooled, again):
        raise ValueError("it gives the same image another vector each time; take a tower that draws nothing in use")
    return pooled.shape[-1]


def native_image_size(config: Any) -> int | None:
    """The side in pixels that `config` was trained for, or None if it does not say."""
    size = family_of(config).image_size(config)
    return size[-1] if isinstance(size, (list, tuple)) else size


def resize_tower(tower: Any, *, image_size: int, pooling: str | None = None) -> Any:
    """`tower` for images of `image_size` px: position tables interpolated once, the rest as it was.

    Args:
        pooling: what the tower was built for; None for the family's own.

    Raises:
        ValueError: if the size is no multiple of the patch size.
    """
    config = copy.deepcopy(tower.config)
    family_of(config).set_image_size(config, image_size)
    pooling = pooling or default_pooling(config)
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int) and image_size % patch:
        low = image_size // patch * patch
        fitting = f"{low} or {low + patch}" if low else str(patch)
        raise ValueError(f"image_size {image_size} is no multiple of the patch size {patch}; use {fitting}")
    resized = build_tower(config, pooling=pooling)
    state, wanted = tower.state_dict(), resized.state_dict()
    resized.load_state_dict(
        {
            # class tokens' distances come after those of the grid
            name: resample_positions(state[name], value.shape, last=name.endswith("relative_position_bias_table"))
            for name, value in wanted.items()
        }
    )
    return resized.to(tower.dtype)


def resample_positions(table: Tensor, shape: torch.Size, *, last: bool = False) -> Tensor:
    """A position table [..., N, W] resampled to `shape` by bicubic interpolation; rows outside the grid are kept.

    Args:
        last: whether those rows come after the grid's, and not before.

    Raises:
        ValueError: if its rows are no square grid.

    >>> resample_positions(torch.zeros(1, 1 + 16, 8), torch.Size([1, 1 + 36, 8])).shape
    torch.Size([1, 37, 8])
    """
    if table.shape == shape:
        return table
    old, new, width = table.shape[-2], shape[-2], shape[-1]
    extra = next((n for n in range(min(old, new)) if _is_square(old - n) and _is_square(new - n)), None)
    if extra is None or table.shape[-1] != width:
        raise ValueError(f"its positions {list(table.shape)} are no square grid; leave image_size as it is")
    flat = table.reshape(old, width).float()
    first, grid = (flat[:0], flat[: old - extra]) if last else (flat[:extra], flat[extra:])
    side, new_side = math.isqrt(old - extra), math.isqrt(new - extra)
    grid = grid.reshape(1, side, side, width).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(new_side, new_side), mode="bicubic", antialias=True)
    grid = grid.permute(0, 2, 3, 1).reshape(new_side * new_side, width)
    return torch.cat([first, grid, *([flat[old - extra :]] if last else [])]).reshape(shape).to(table.dtype)


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def moving_norms(tower: nn.Module) -> list[nn.Module]:
    """Norms that learn, and keep statistics of the images they see (BatchNorm)."""
    return [module for module in _norms_with_statistics(tower) if any(p.requires_grad for p in module.parameters())]


def hold_locked_norms(tower: nn.Module) -> None:
    """Keep norms that do not learn at the statistics they have, as in evaluation; after each `train()`."""
    for module in _norms_with_statistics(tower):
        if not any(p.requires_grad for p in module.parameters()):
            module.eval()


def _norms_with_statistics(tower: nn.Module) -> list[nn.Module]:
    return [module for module in tower.modules() if getattr(module, "running_mean", None) is not None]


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
    """Keeps a random part of each image's patch tokens while training (FLIP, arXiv 2212.00794); all in evaluation.

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
