"""Random boxes against torchvision's rule, resizing against Pillow, JPEGs scaled down in decoding against full ones."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip.data.images import load_image
from llm2clip.student.pixels import (
    NUM_DRAWS,
    TRAIN_RATIO,
    center_crop,
    full_shape,
    random_box,
    resize_pixels,
    resized_shape,
    scale_factors,
    to_tensor,
)


def photo(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Smooth colours with edges and some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
    smooth[height // 3 :, width // 4 : width // 2] //= 2
    return Image.fromarray((smooth + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(640, 480), (512, 384), (100, 400), (400, 100), (3, 1)])
def test_boxes_lie_inside_and_keep_nine_tenths_where_the_ratio_allows(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        left, top, right, bottom = random_box(*size, rng.random(NUM_DRAWS).tolist())
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        if TRAIN_RATIO[0] <= size[0] / size[1] <= TRAIN_RATIO[1]:
            assert (right - left) * (bottom - top) >= 0.89 * size[0] * size[1]


@pytest.mark.parametrize("min_crop", [0.9, 0.2])
@pytest.mark.parametrize("size", [(320, 300), (37, 53), (400, 100), (100, 400), (3, 1), (1, 3)])
def test_a_box_is_torchvisions_for_the_same_random_numbers(
    size: tuple[int, int], min_crop: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    crop, image = v2.RandomResizedCrop(8, scale=(min_crop, 1.0)), torch.zeros(3, *size[::-1], dtype=torch.uint8)
    for draws in np.random.default_rng(0).random((50, NUM_DRAWS)).tolist():
        shapes, places = iter(draws[:-2]), iter((draws[-1], draws[-2]))  # area and ratio of each try; then top and left

        def uniform(tensor: torch.Tensor, low: float, high: float, draw: Iterator[float] = shapes) -> torch.Tensor:
            return torch.full_like(tensor, low + (high - low) * next(draw), dtype=torch.float64)

        def whole(low: int, high: int, size: object, draw: Iterator[float] = places) -> torch.Tensor:
            return torch.tensor([int(next(draw) * high)])

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", uniform)
            patch.setattr(torch, "randint", whole)
            theirs = crop.make_params([image])
        left, top = theirs["left"], theirs["top"]
        expected = (left, top, left + theirs["width"], top + theirs["height"])
        assert random_box(*size, draws, min_crop=min_crop) == expected


def test_a_box_reaches_every_edge() -> None:
    """Half the area, square: 71 of 100 pixels a side, in 30 places each way."""
    shape = [0.0, 0.5] * 10
    assert random_box(100, 100, [*shape, 0.0, 0.0], min_crop=0.5) == (0, 0, 71, 71)
    assert random_box(100, 100, [*shape, 0.999, 0.0], min_crop=0.5) == (29, 0, 100, 71)
    assert random_box(100, 100, [*shape, 0.0, 0.999], min_crop=0.5) == (0, 29, 71, 100)


def test_a_image_too_wide_for_any_box_gives_its_middle() -> None:
    assert random_box(400, 100, [0.5] * NUM_DRAWS) == (133, 0, 266, 100)
    assert random_box(100, 400, [0.5] * NUM_DRAWS) == (0, 133, 100, 266)


@pytest.mark.parametrize("mode", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
def test_resizing_equals_pillow(mode: Image.Resampling) -> None:
    image = photo(200, 150)
    for shape in ((64, 80), (224, 224)):
        ours = resize_pixels(to_tensor(image), shape, resample=mode)[:3].permute(1, 2, 0).numpy().astype(int)
        difference = np.abs(ours - np.asarray(image.resize(shape[::-1], mode)).astype(int))
        assert difference.max() <= 2 and difference.mean() < 0.1


def test_a_box_resized_equals_pillows_crop_and_resize() -> None:
    image, (left, top, right, bottom) = photo(200, 150), (7, 11, 190, 141)
    ours = resize_pixels(to_tensor(image)[:, top:bottom, left:right], (96, 96))[:3].permute(1, 2, 0).numpy().astype(int)
    theirs = np.asarray(image.crop((left, top, right, bottom)).resize((96, 96), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - theirs).max() <= 2


def test_center_crop_by_hand() -> None:
    pixels = torch.arange(5 * 4, dtype=torch.uint8).view(1, 5, 4)
    assert center_crop(pixels, (2, 2)).tolist() == [[[5, 6], [9, 10]]]
    assert center_crop(pixels[:, :1, :1] + 9, (2, 3)).tolist() == [[[0, 9, 0], [0, 0, 0]]]


def test_shorter_side_by_hand() -> None:
    assert resized_shape(300, 401, 224) == (224, 299)  # 299.4
    assert resized_shape(401, 300, 224) == (299, 224)


def test_a_scaled_jpeg_stays_close_to_the_full_one_though_its_size_does_not_divide() -> None:
    data = jpeg(photo(1001, 803))
    full, scaled = load_image(data), load_image(data, min_size=380)
    assert scaled.size == (501, 402) and full_shape(scaled) == (803, 1001)
    shape = resized_shape(803, 1001, 128)
    expected = resize_pixels(to_tensor(full), shape).int()
    fitted = (resize_pixels(to_tensor(scaled), shape, full_shape=(803, 1001)).int() - expected).abs().float()
    naive = (resize_pixels(to_tensor(scaled), shape).int() - expected).abs().float()
    assert (fitted <= 2).float().mean() > 0.98 and fitted.mean() < naive.mean()


def test_full_shape_of_a_turned_image() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(801, 403).save(buffer, "JPEG", exif=exif)
    image = load_image(buffer.getvalue(), min_size=200)
    assert image.size == (202, 401) and full_shape(image) == (801, 403)


def test_scale_factors_always_end_at_the_wanted_size() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5000):
        height, width = rng.integers(600, 6000, 2).tolist()
        part = int(rng.choice([2, 4, 8]))
        present = (-(-height // part), -(-width // part))
        wanted = resized_shape(height, width, int(rng.integers(32, min(present) + 1)))
        scale = scale_factors(present, wanted, (height, width))
        if scale is not None:
            assert tuple(int(size * factor) for size, factor in zip(present, scale, strict=True)) == wanted


@pytest.mark.parametrize("image", [photo(200, 150), photo(64, 48)], ids=["resized", "of-the-size"])
@pytest.mark.parametrize("channels", [3, 4])
def test_what_is_resized_into_given_memory_is_the_same(image: Image.Image, channels: int) -> None:
    pixels, out = to_tensor(image)[:channels], torch.zeros(48, 64, 4, dtype=torch.uint8)
    found = resize_pixels(pixels, (48, 64), out=out)
    assert torch.equal(found, resize_pixels(pixels, (48, 64)))
    assert (found.data_ptr() == out.data_ptr()) == (len(pixels) == 4 and image.width == 200)
    assert out.any() == (found.data_ptr() == out.data_ptr())
