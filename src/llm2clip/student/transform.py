"""Image to uint8 pixels [3, H, W]: as a tower's own image processor resizes and crops, or the paper's augmentation.

Pixels stay uint8 up to the device, where the student normalises them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from llm2clip.artifacts import write_json
from llm2clip.errors import UsageError, shown
from llm2clip.student.pixels import (
    MIN_CROP,
    center_crop,
    full_shape,
    random_box,
    resize_pixels,
    resized_shape,
    to_tensor,
)

EVAL_DECODE_FACTOR, TRAIN_DECODE_FACTOR = 3, 2
"""JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where that leaves this many times the pixels needed per side.

At 3, on sharp photographs of 1 to 10 megapixels, 98.9% or more of the values stay within 2/255 of a full decode, 0.5
apart on average, in a third of the time; at 2, 90% and 1.1 apart, which a random crop hides.
"""
_TIMM_RESAMPLE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "random": Image.Resampling.BICUBIC,
}


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """What a tower's image processor does to an image before normalisation.

    Args:
        image_size: height and width that come out.
        resize: an int, what the shorter side becomes; or height and width, whatever the image's shape.
        resample: Pillow's number of the filter; training always uses bicubic, as the paper does.
        mean, std: per channel, for pixels scaled to 0..1; applied on the device by the student. By default CLIP's.

    Example:
        >>> transform = ImageTransform(image_size=(32, 32), resize=32)
        >>> pixels = transform(Image.new("RGB", (64, 48), "red"))
        >>> pixels.shape, pixels.dtype, pixels[:, 0, 0].tolist()
        (torch.Size([3, 32, 32]), torch.uint8, [255, 0, 0])
    """

    image_size: tuple[int, int]
    resize: int | tuple[int, int]
    resample: int = Image.Resampling.BICUBIC
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixels uint8 [3, H, W] of an RGB image as the tower's processor sees it: resized, then cropped."""
        full = full_shape(image)
        shape = resized_shape(*full, self.resize)
        pixels = resize_pixels(to_tensor(image), shape, full_shape=full, resample=self.resample)
        return center_crop(pixels[:3], self.image_size)

    def augmented(
        self, image: Image.Image, draws: Sequence[float], *, min_crop: float = MIN_CROP, out: Tensor | None = None
    ) -> Tensor:
        """Pixels uint8 [C, H, W] of a random crop of an RGB image, resized by bicubic interpolation; see `to_tensor`.

        Args:
            draws: `NUM_DRAWS` numbers in [0, 1) that decide the crop.
            min_crop: smallest share of the area that is kept.
            out: uint8 [H, W, 4]; where it can be, the pixels are written there.
        """
        left, top, right, bottom = random_box(image.width, image.height, draws, min_crop=min_crop)
        return resize_pixels(to_tensor(image)[:, top:bottom, left:right], self.image_size, out=out)

    @property
    def eval_decode_size(self) -> int:
        """The shorter side, in pixels, at which a JPEG may be decoded for `__call__` (`load_image(min_size=...)`)."""
        return EVAL_DECODE_FACTOR * (self.resize if isinstance(self.resize, int) else max(self.resize))

    @property
    def train_decode_size(self) -> int:
        """The shorter side, in pixels, at which a JPEG may be decoded for `augmented`."""
        return TRAIN_DECODE_FACTOR * max(self.image_size)

    def at_size(self, image_size: int) -> ImageTransform:
        """The same for images of another size, the margins that are cropped away in proportion."""
        height, width = self.image_size
        if isinstance(self.resize, int):
            resize: int | tuple[int, int] = round(self.resize * image_size / min(height, width))
        else:
            resize = (round(self.resize[0] * image_size / height), round(self.resize[1] * image_size / width))
        return replace(self, image_size=(image_size, image_size), resize=resize)

    @classmethod
    def from_processor(cls, processor: Any) -> ImageTransform:
        """The transform equal to an image processor of transformers (CLIP, SigLIP, BiT, ViT, ..., or timm's wrapper).

        Raises:
            UsageError: if it gives no fixed size, or makes other pixels of a test image than this transform.
        """
        if getattr(processor, "data_config", None) is not None:
            return _from_timm(processor.data_config)
        fields = processor.to_dict()
        transform = _from_fields(fields)
        _check_probe(transform, processor, fields)
        return transform

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | Path, *, revision: str | None = None, name: str | None = None
    ) -> ImageTransform:
        """The transform of a tower or student: from its saved image processor; messages call the model `name`.

        Raises:
            UsageError: if there is no image processor, or it gives no fixed size.
        """
        from transformers import AutoImageProcessor

        try:
            processor = AutoImageProcessor.from_pretrained(path_or_id, revision=revision, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"{name or path_or_id} has no usable image processor ({reason})") from None
        return cls.from_processor(processor)

    def to_dict(self) -> dict[str, Any]:
        """What `preprocessor_config.json` says, for any program that uses transformers' image processors."""
        height, width = self.image_size
        cropped = isinstance(self.resize, int) or self.resize != self.image_size
        if isinstance(self.resize, int):
            size = {"shortest_edge": self.resize}
        else:
            size = {"height": self.resize[0], "width": self.resize[1]}
        return {
            "image_processor_type": "CLIPImageProcessor" if cropped else "SiglipImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": size,
            "resample": int(self.resample),
            "do_center_crop": cropped,
            **({"crop_size": {"height": height, "width": width}} if cropped else {}),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def save(self, folder: str | Path) -> None:
        """Write `folder/preprocessor_config.json`."""
        write_json(Path(folder) / "preprocessor_config.json", self.to_dict())

    def save_with(self, tower: Any, folder: str | Path) -> None:
        """Write a tower's weights and config to `folder`, and how its images are prepared, for whoever opens it.

        Of a timm tower transformers would build timm's own processor from the config, with the size that timm trained
        the weights at, and with odd margins rounded where others drop the half: the config names ours.
        """
        before = tower.config
        tower.config = copy.deepcopy(before)
        if before.model_type == "timm_wrapper":
            tower.config.image_processor_type = self.to_dict()["image_processor_type"]
            tower.config.pretrained_cfg = {**(getattr(before, "pretrained_cfg", None) or {}), **self._timm_fields()}
        try:
            tower.save_pretrained(folder)
        finally:
            tower.config = before
        self.save(folder)

    def _timm_fields(self) -> dict[str, Any]:
        """The same, as timm's `pretrained_cfg` says it."""
        resize = self.resize if isinstance(self.resize, int) else max(self.resize)
        return {
            "input_size": [3, *self.image_size],
            "crop_pct": max(self.image_size) / resize,
            "crop_mode": "center" if isinstance(self.resize, int) else "squash",
            "interpolation": "bilinear" if self.resample == Image.Resampling.BILINEAR else "bicubic",
            "mean": list(self.mean),
            "std": list(self.std),
        }


def _from_fields(fields: dict[str, Any]) -> ImageTransform:
    """From the fields of a `preprocessor_config.json`, of today or of years ago."""
    name = fields.get("image_processor_type") or fields.get("feature_extractor_type") or "the image processor"
    resize = _size(fields.get("size"), square=fields.get("default_to_square", "CLIP" not in name))
    if resize is None or not fields.get("do_resize", True) or "patch_size" in fields or "max_num_patches" in fields:
        raise UsageError(
            f"{name} gives images of no fixed size (size {fields.get('size')}); take a tower of fixed resolution"
        )
    crop: Any = None
    if (rule := next((rule for family, rule in _OWN_RULES.items() if name.startswith(family)), None)) is not None:
        resize, crop = rule(resize, fields)
    elif fields.get("do_center_crop", fields.get("crop_size") is not None):
        crop = _size(fields.get("crop_size"), square=True)
    if crop is None:
        if isinstance(resize, int):
            raise UsageError(f"{name} resizes the shorter side and crops nothing: take a tower of fixed resolution")
        crop = resize
    # pixels p in 0..255 become (p * factor - mean) / std; ours are (p / 255 - mean) / std
    factor = 255 * fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 255.0
    normalised = fields.get("do_normalize", True) and fields.get("image_mean") is not None
    mean, std = (fields["image_mean"], fields["image_std"]) if normalised else ((0.0,) * 3, (1.0,) * 3)
    exact = abs(factor - 1) < 1e-6
    return ImageTransform(
        image_size=crop,
        resize=resize,
        resample=int(fields.get("resample", Image.Resampling.BICUBIC)),
        mean=tuple(float(value) if exact else value / factor for value in mean),
        std=tuple(float(value) if exact else value / factor for value in std),
    )


def _convnext(side: Any, fields: dict[str, Any]) -> tuple[Any, Any]:
    """Below 384 a margin is cropped away, from 384 on the image is squeezed into the square."""
    if not isinstance(side, int) or side >= 384:
        return (side, side) if isinstance(side, int) else side, None
    return int(side / fields.get("crop_pct", 224 / 256)), (side, side)


def _poolformer(side: Any, fields: dict[str, Any]) -> tuple[Any, Any]:
    crop = _size(fields.get("crop_size"), square=True) if fields.get("do_center_crop", True) else None
    share = fields.get("crop_pct")
    if share is None:
        return side, crop
    return (int(side / share) if isinstance(side, int) else (int(side[0] / share), int(side[1] / share))), crop


def _levit(side: Any, fields: dict[str, Any]) -> tuple[Any, Any]:
    crop = _size(fields.get("crop_size"), square=True) if fields.get("do_center_crop", True) else None
    return (int(256 / 224 * side) if isinstance(side, int) else side), crop


_OWN_RULES = {"ConvNext": _convnext, "PoolFormer": _poolformer, "Levit": _levit}
"""Image processors that resize by rules of their own: (size, fields) -> what to resize to and to crop."""
_KNOWN_FIELDS = frozenset(
    "size crop_size do_resize do_center_crop do_rescale do_normalize rescale_factor image_mean image_std resample "
    "do_convert_rgb default_to_square image_processor_type feature_extractor_type processor_class data_format "
    "input_data_format device return_tensors disable_grouping crop_pct".split()
)
_PROBE_DIFFERENCE = 4.0
"""Mean difference, of 255, from which on a processor does something else. Filters of Pillow and torch differ by 1."""


def _check_probe(transform: ImageTransform, processor: Any, fields: dict[str, Any]) -> None:
    """Check that a processor makes the same pixels of a test image, so that none of its settings is passed over.

    Raises:
        UsageError: naming the settings that are not known here.
    """
    blocks = np.random.default_rng(0).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    image = Image.fromarray(np.kron(blocks, np.ones((20, 20, 1), np.uint8)))
    wanted = np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0], np.float64)
    mean, std = (np.array(values)[:, None, None] for values in (transform.mean, transform.std))
    ours = (transform(image).numpy() / 255 - mean) / std
    same = wanted.shape == ours.shape
    apart = float(np.abs((wanted - ours) * std).mean() * 255) if same else math.inf
    if apart < _PROBE_DIFFERENCE:
        return
    unknown = {key: value for key, value in fields.items() if key not in _KNOWN_FIELDS and value not in (None, False)}
    found = f"{apart:.0f} of 255 apart" if same else f"{list(wanted.shape)}, not {list(ours.shape)}"
    raise UsageError(
        f"{type(processor).__name__} prepares images in a way that is not known here (a test image comes out {found}; "
        f"{', '.join(f'{key}={shown(value)}' for key, value in unknown.items()) or 'no setting says why'}); take "
        "another tower"
    )


def _size(size: Any, *, square: bool) -> int | tuple[int, int] | None:
    """A processor's size as shorter side or height and width; None if it is neither."""
    if isinstance(size, int):
        return (size, size) if square else size
    if isinstance(size, dict):
        present = {key: value for key, value in size.items() if value is not None}
        if set(present) == {"shortest_edge"}:
            return int(present["shortest_edge"])
        if set(present) == {"height", "width"}:
            return int(present["height"]), int(present["width"])
    return None


def _from_timm(settings: dict[str, Any]) -> ImageTransform:
    """From timm's `data_config`. Where an odd margin is cropped, timm's crop may lie one pixel further."""
    _, height, width = settings["input_size"]
    kept, mode = settings.get("crop_pct") or 1.0, settings.get("crop_mode") or "center"
    resample = _TIMM_RESAMPLE.get(settings.get("interpolation", "bicubic"))
    if mode not in ("center", "squash") or resample is None or (mode == "center" and height != width):
        raise UsageError(
            f"this timm tower prepares images by crop_mode {mode!r}, {settings.get('interpolation')!r}, "
            f"{height} x {width}: known are center (square) and squash, bilinear and bicubic; take another tower"
        )
    resize = math.floor(height / kept) if mode == "center" else (math.floor(height / kept), math.floor(width / kept))
    return ImageTransform(
        image_size=(height, width),
        resize=resize,
        resample=int(resample),
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
    )
