"""The transform equals each family's own image processor, and survives being saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from llm2clip.errors import UsageError
from llm2clip.student.pixels import NUM_DRAWS, random_box
from llm2clip.student.transform import ImageTransform

from .test_pixels import photo

PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPImageProcessor", {"size": {"shortest_edge": 96}, "crop_size": {"height": 96, "width": 96}}),
    "clip-of-2021": ("CLIPImageProcessor", {"size": 64, "crop_size": 64}),
    "siglip": ("SiglipImageProcessor", {"size": {"height": 112, "width": 112}}),
    "dinov2": ("BitImageProcessor", {"size": {"shortest_edge": 73}, "crop_size": {"height": 64, "width": 64}}),
    "vit": ("ViTImageProcessor", {"size": {"height": 64, "width": 64}}),
    "larger-than-the-image": (
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 64, "width": 65}},
    ),
}


def processor_of(name: str, backend: str) -> Any:
    class_name, options = PROCESSORS[name]
    processor_class = getattr(transformers, class_name + backend, None)
    if processor_class is None:
        pytest.skip(f"this transformers has no {class_name}{backend}")
    return processor_class(**options)


def pixels_of(processor: Any, transform: ImageTransform, image: Image.Image) -> torch.Tensor:
    """What the processor gives, before normalisation: 0..255."""
    values = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (transform.mean, transform.std))
    return 255 * (values * std + mean)


@pytest.mark.parametrize("backend", ["", "Pil"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_equal_those_of_the_image_processor(name: str, backend: str) -> None:
    processor = processor_of(name, backend)
    transform = ImageTransform.from_processor(processor)
    for size in ((160, 120), (91, 200), (50, 40), (64, 64)):
        ours = transform(photo(*size))
        theirs = pixels_of(processor, transform, photo(*size))
        assert ours.dtype == torch.uint8 and ours.shape == theirs.shape
        if backend == "Pil" and name == "larger-than-the-image":
            continue  # numpy's rule puts the odd row of black on the other side
        difference = (ours - theirs).abs()
        assert difference.max() < 2.01 and difference.mean() < (0.3 if backend else 1e-4)  # of 255


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_saved_transform_is_the_same_and_loads_in_transformers(name: str, tmp_path: Path) -> None:
    transform = ImageTransform.from_processor(processor_of(name, ""))
    transform.save(tmp_path)
    assert ImageTransform.from_pretrained(tmp_path) == transform
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert (transform(photo(90, 120)) - pixels_of(processor, transform, photo(90, 120))).abs().max() < 2.01


@pytest.mark.parametrize(
    "settings",
    [
        {"input_size": (3, 64, 64), "crop_pct": 0.8, "crop_mode": "center", "interpolation": "bicubic"},
        {"input_size": (3, 64, 64), "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"},
        {"input_size": (3, 64, 64), "crop_pct": 0.8, "crop_mode": "squash", "interpolation": "bilinear"},
    ],
)
def test_pixels_equal_those_of_timm(settings: dict[str, Any]) -> None:
    pytest.importorskip("timm")
    config = {**settings, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    processor = transformers.TimmWrapperImageProcessor(pretrained_cfg=config)
    transform = ImageTransform.from_processor(processor)
    for size in ((160, 120), (91, 201)):  # margins of even width, see `_from_timm`
        assert (transform(photo(*size)) - pixels_of(processor, transform, photo(*size))).abs().max() < 2.01


def test_a_processor_that_only_scales_normalises_by_nothing() -> None:
    processor = transformers.ViTImageProcessor(do_normalize=False)
    transform = ImageTransform.from_processor(processor)
    assert transform.mean == (0.0, 0.0, 0.0) and transform.std == (1.0, 1.0, 1.0)


def test_values_in_minus_one_to_one_without_rescaling() -> None:
    fields = {"size": 8, "do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3}
    transform = ImageTransform.from_processor(transformers.ViTImageProcessor(**fields))
    assert transform.mean == pytest.approx([0.5] * 3) and transform.std == pytest.approx([0.5] * 3)


@pytest.mark.parametrize(
    "processor",
    [
        transformers.ViTImageProcessor(size={"shortest_edge": 8, "longest_edge": 16}),
        transformers.ViTImageProcessor(do_resize=False),
        transformers.ViTImageProcessor(size={"shortest_edge": 8}),
    ],
)
def test_no_fixed_size_is_refused(processor: Any) -> None:
    with pytest.raises(UsageError, match="fixed"):
        ImageTransform.from_processor(processor)


def test_a_timm_tower_with_borders_is_refused() -> None:
    pytest.importorskip("timm")
    config = {"input_size": (3, 8, 8), "crop_mode": "border", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(UsageError, match="border"):
        ImageTransform.from_processor(transformers.TimmWrapperImageProcessor(pretrained_cfg=config))


def test_a_folder_without_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no usable image processor"):
        ImageTransform.from_pretrained(tmp_path)


def test_another_size_keeps_the_margins_in_proportion() -> None:
    dinov2 = ImageTransform(image_size=(224, 224), resize=256)
    assert dinov2.at_size(448) == ImageTransform(image_size=(448, 448), resize=512)
    siglip = ImageTransform(image_size=(224, 224), resize=(224, 224)).at_size(384)
    assert siglip.resize == siglip.image_size == (384, 384)


def test_a_crop_of_the_whole_image_is_the_squashed_image() -> None:
    transform = ImageTransform(image_size=(32, 32), resize=(32, 32))
    image = photo(90, 90)
    assert torch.equal(transform.augmented(image, [0.999] * NUM_DRAWS)[:3], transform(image))


def test_another_size_of_a_image_that_is_no_square() -> None:
    tall = ImageTransform(image_size=(32, 24), resize=(40, 30))
    assert tall.at_size(64) == ImageTransform(image_size=(64, 64), resize=(80, 80))
    assert ImageTransform(image_size=(32, 24), resize=40).at_size(48).resize == 80  # 40 to 24 as 80 to 48


def test_sizes_at_which_jpegs_are_decoded() -> None:
    tall = ImageTransform(image_size=(32, 24), resize=(40, 60))
    assert (tall.eval_decode_size, tall.train_decode_size) == (3 * 60, 2 * 32)
    assert ImageTransform(image_size=(32, 24), resize=40).eval_decode_size == 3 * 40


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("min_crop", [0.9, 0.3])
def test_augmentation_is_pillows_crop_and_bicubic_resize_whatever_the_towers_filter(
    resample: Image.Resampling, min_crop: float
) -> None:
    transform = ImageTransform(image_size=(64, 48), resize=64, resample=resample)
    image, others = photo(45, 40), 0.0
    for draws in np.random.default_rng(0).random((5, NUM_DRAWS)).tolist():
        part = image.crop(random_box(45, 40, draws, min_crop=min_crop))
        ours = transform.augmented(image, draws, min_crop=min_crop)[:3].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(ours - np.asarray(part.resize((48, 64), Image.Resampling.BICUBIC))).max() <= 2
        bilinear = np.asarray(part.resize((48, 64), Image.Resampling.BILINEAR)).astype(int)
        others = max(others, np.abs(ours - bilinear).max())
    assert others > 10, "the image does not tell the filters apart"


OWN_RULES: list[tuple[str, dict[str, Any]]] = [
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 96}, "crop_pct": 0.7}),
    ("PoolFormerImageProcessor", {}),
    ("PoolFormerImageProcessor", {"crop_pct": 0.6}),
    ("PoolFormerImageProcessor", {"crop_pct": None, "size": {"shortest_edge": 240}}),
    ("LevitImageProcessor", {}),
    ("LevitImageProcessor", {"size": {"height": 230, "width": 250}}),
    ("BitImageProcessor", {}),
    ("ViTImageProcessor", {"do_rescale": True, "image_mean": [0.1, 0.2, 0.3]}),
    ("DeiTImageProcessor", {}),
    ("BeitImageProcessor", {}),
]


@pytest.mark.parametrize(("name", "settings"), OWN_RULES)
def test_processors_with_rules_of_their_own(name: str, settings: dict[str, Any]) -> None:
    processor = getattr(transformers, name)(**settings)
    rng = np.random.default_rng(5)
    image = Image.fromarray(np.kron(rng.integers(0, 255, (10, 13, 3)), np.ones((24, 20, 1))).astype(np.uint8))
    wanted = processor(images=image, return_tensors="pt")["pixel_values"][0].float()
    transform = ImageTransform.from_processor(processor)
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (transform.mean, transform.std))
    got = (transform(image).float() - mean) / std
    assert got.shape == wanted.shape
    assert ((got - wanted) * std).abs().mean() < 2.5


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("MobileViTImageProcessor", {}, "do_flip_channel_order=True"),
        ("EfficientNetImageProcessor", {}, "include_top=True"),
        ("EfficientNetImageProcessor", {"rescale_factor": 1 / 127.5, "rescale_offset": True}, "rescale_offset=True"),
    ],
)
def test_a_setting_that_is_not_understood_is_named(name: str, settings: dict[str, Any], says: str) -> None:
    processor = getattr(transformers, name)(**settings)
    with pytest.raises(UsageError, match=f"is not known here .*{says}"):
        ImageTransform.from_processor(processor)
