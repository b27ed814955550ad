"""Ordinary and odd images come out as upright RGB; damaged ones with their cause."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llm2clip.data import images
from llm2clip.data.bad import BadImage
from llm2clip.data.images import check_file, check_header, load_image
from llm2clip.data.sample import ImageRef

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    7: Image.Transpose.TRANSVERSE,
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pixel(data: bytes, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = load_image(data)
    assert image.mode == "RGB"
    return image.getpixel(at)  # type: ignore[return-value]


def close(found: tuple[int, ...], wanted: tuple[int, ...], within: int = 4) -> bool:
    return all(abs(a - b) <= within for a, b in zip(found, wanted, strict=True))


def cause_of(data: Any) -> str:
    with pytest.raises(BadImage) as caught:
        load_image(data)
    assert "\n" not in str(caught.value)
    return caught.value.cause


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO"])
def test_formats(form: str) -> None:
    assert close(pixel(encode(Image.new("RGB", (16, 16), (200, 40, 90)), form)), (200, 40, 90), 6)


def test_greyscale_and_black_and_white() -> None:
    assert pixel(encode(Image.new("L", (4, 4), 77), "PNG")) == (77, 77, 77)
    assert close(pixel(encode(Image.new("L", (16, 16), 77), "JPEG")), (77, 77, 77))
    assert pixel(encode(Image.new("1", (4, 4), 1), "PNG")) == (255, 255, 255)


def test_cmyk_jpeg_as_adobe_writes_it_is_not_inverted() -> None:
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    assert b"Adobe" in data
    assert close(pixel(data), (255, 0, 0), 12)
    assert close(pixel(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF")), (255, 0, 0), 2)


def test_palette_with_and_without_transparency() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert pixel(encode(image, "PNG")) == (10, 200, 30)
    assert pixel(encode(image, "PNG", transparency=1)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "colour", "wanted"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (0, 0), (255, 255, 255)),
    ],
)
def test_alpha_lies_on_white(mode: str, colour: Any, wanted: tuple[int, int, int]) -> None:
    assert close(pixel(encode(Image.new(mode, (4, 4), colour), "PNG")), wanted, 1)


def test_a_colour_key_is_transparent_too() -> None:
    assert pixel(encode(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == (255, 255, 255)
    assert pixel(encode(Image.new("L", (4, 4), 9), "PNG", transparency=9)) == (255, 255, 255)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_is_scaled_not_clipped(form: str) -> None:
    for value in (1, 100, 200, 255):  # 257 x 200 / 256 would be 201
        values = np.full((4, 4), 257 * value, np.uint16)
        assert pixel(encode(Image.fromarray(values), form)) == (value, value, value)


def test_dark_16_bit_stays_dark() -> None:
    assert pixel(encode(Image.fromarray(np.full((4, 4), 200, np.uint16)), "PNG")) == (1, 1, 1)


def test_16_bit_colour_png() -> None:
    rows = b"".join(b"\0" + struct.pack(">HHH", 257 * 10, 257 * 20, 257 * 30) * 2 for _ in range(2))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    assert pixel(b"\x89PNG\r\n\x1a\n" + b"".join(map(png_chunk, chunks))) == (10, 20, 30)


def png_chunk(chunk: tuple[bytes, bytes]) -> bytes:
    name, data = chunk
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(0.5, 128), (1.0, 255), (1.5, 2), (128.0, 128), (255.0, 255), (51400.0, 200), (float("nan"), 0), (-3.0, 0)],
)
def test_float_images(value: float, wanted: int) -> None:
    data = encode(Image.fromarray(np.full((2, 2), value, np.float32)), "TIFF")
    assert pixel(data) == (wanted,) * 3


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    for form in ("GIF", "WEBP", "PNG"):
        data = encode(frames[0], form, save_all=True, append_images=frames[1:])
        assert close(pixel(data), (250, 0, 0), 6), form


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_image_upright(orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), (0, 0, 0))
    upright.paste((255, 255, 255), (0, 0, 16, 8))  # white in the upper left quarter
    inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turn = inverse.get(orientation, TURNS.get(orientation))
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(encode(stored, "JPEG", exif=exif, quality=95))
    assert image.size == (32, 16)
    assert min(image.getpixel((4, 3))) > 200
    assert max(max(image.getpixel(at)) for at in ((28, 3), (4, 12), (28, 12))) < 50


def test_damaged_exif_leaves_the_image_as_it_is(jpeg: bytes) -> None:
    segment = b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 20
    data = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]
    assert load_image(data).size == (12, 8)


def test_the_extension_means_nothing(tmp_path: Path, make_image: Callable[..., bytes]) -> None:
    for name in ("a.JPG", "b.txt", "c", "d.jpeg.PNG", "ünïcødé 画像.jpg"):
        (tmp_path / name).write_bytes(make_image(form="PNG"))
        assert load_image(tmp_path / name).size == (12, 8)
        assert load_image(str(tmp_path / name)).size == (12, 8)


def test_an_opened_image_and_a_range_are_taken_too(tmp_path: Path, jpeg: bytes) -> None:
    (tmp_path / "x").write_bytes(b"before" + jpeg + b"after")
    assert load_image(ImageRef(str(tmp_path / "x"), 6, len(jpeg))).size == (12, 8)
    opened = Image.new("RGBA", (3, 5), (0, 0, 0, 0))
    assert load_image(opened).getpixel((0, 0)) == (255, 255, 255)
    assert opened.mode == "RGBA"


def test_min_size_decodes_smaller_but_never_too_small() -> None:
    data = encode(Image.new("RGB", (640, 480), (9, 99, 199)), "JPEG")
    assert load_image(data, min_size=60).size == (80, 60)
    assert load_image(data, min_size=61).size == (160, 120)
    assert load_image(data, min_size=1000).size == (640, 480)
    assert load_image(encode(Image.new("RGB", (640, 480)), "PNG"), min_size=60).size == (640, 480)


def test_causes(tmp_path: Path, jpeg: bytes) -> None:
    (tmp_path / "empty.jpg").touch()
    assert cause_of(tmp_path / "missing.jpg") == "missing file"
    assert cause_of(tmp_path / "empty.jpg") == "empty image"
    assert cause_of(tmp_path) == "unreadable file"
    assert cause_of("a\0b.jpg") == "missing file"
    assert cause_of(b"<html>not found</html>") == "not an image"
    assert cause_of(b"") == "not an image"
    assert cause_of(jpeg[:-40]) == "truncated image"  # in the header
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    assert cause_of(encode(Image.fromarray(noise), "JPEG")[:-200]) == "truncated image"
    assert cause_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not an image"


def test_bombs_are_refused_by_their_header() -> None:
    def png(width: int, height: int) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + png_chunk((b"IHDR", header)) + png_chunk((b"IDAT", zlib.compress(b"\0" * 99)))

    assert cause_of(png(50_000, 50_000)) == "decompression bomb"
    with pytest.raises(BadImage, match="decompression bomb"):
        check_header(io.BytesIO(png(2**31 - 1, 2**31 - 1)), "huge.png")


def test_the_bomb_limit_is_ours_even_without_pillows(monkeypatch: pytest.MonkeyPatch, jpeg: bytes) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(images, "MAX_PIXELS", 95)
    assert cause_of(jpeg) == "decompression bomb"
    monkeypatch.setattr(images, "MAX_PIXELS", 96)
    assert load_image(jpeg).size == (12, 8)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "AVIF"])
def test_a_cut_at_any_byte_is_a_bad_image_or_a_image(form: str) -> None:
    Image.init()
    if form not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {form}")
    noise = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
    data = encode(Image.fromarray(noise), form)
    outcomes = set()
    for cut in range(0, len(data), max(1, len(data) // 60)):
        try:
            outcomes.add(load_image(data[:cut]).mode)
        except BadImage as error:
            outcomes.add(error.cause)
    assert outcomes <= {"RGB", "not an image", "truncated image", "damaged image"}
    assert len(outcomes - {"RGB"}) >= 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_flipped_bytes_never_escape_as_another_error(form: str) -> None:
    random = np.random.default_rng(1)
    noise = random.integers(0, 255, (24, 24, 3), np.uint8)
    data = np.frombuffer(encode(Image.fromarray(noise), form), np.uint8)
    for _ in range(60):
        broken = data.copy()
        places = random.integers(0, min(len(data), 400), 6)
        broken[places] = random.integers(0, 255, 6)
        try:
            assert load_image(broken.tobytes()).mode == "RGB"
        except BadImage as error:
            assert error.cause and "\n" not in str(error)


def test_check_file_reads_no_more_than_the_header(tmp_path: Path, jpeg: bytes) -> None:
    (tmp_path / "cut.jpg").write_bytes(jpeg[:-5])
    assert check_file(str(tmp_path / "cut.jpg")) == (12, 8)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    for name, cause in (("empty.jpg", "empty image"), ("page.jpg", "not an image"), ("no.jpg", "missing file")):
        with pytest.raises(BadImage, match=cause):
            check_file(str(tmp_path / name))


@pytest.mark.parametrize("has_turbo", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90},
        {"quality": 90, "subsampling": "4:4:4"},
        {"quality": 60, "progressive": True},
        {"quality": 90, "keep_rgb": True},
    ],
    ids=["plain", "full-colour", "progressive", "stored-as-rgb"],
)
def test_jpegs_decoded_to_four_bytes_are_pillows_own(
    options: dict[str, Any], has_turbo: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "HAS_TURBO", has_turbo and images.HAS_TURBO)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8))
    image = image.resize((181, 122), Image.Resampling.BICUBIC)
    for mode in ("RGB", "L", "CMYK"):
        image.convert(mode).save(buffer := io.BytesIO(), "JPEG", **options)
        for min_size in (None, 30):
            theirs = Image.open(io.BytesIO(buffer.getvalue()))
            if min_size:
                theirs.draft(None, (min_size, min_size))
            ours = load_image(buffer.getvalue(), min_size=min_size)
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs.convert("RGB")))
            assert ours.convert("RGBA").getextrema()[3] == (255, 255)


@pytest.mark.parametrize(
    ("size", "is_good"), [((100, 1), True), ((101, 1), False), ((3, 300), True), ((3, 301), False)]
)
def test_a_image_too_thin_to_be_resized(size: tuple[int, int], is_good: bool) -> None:
    file = io.BytesIO()
    image = Image.new("RGB", size)
    image.save(file, "PNG")
    for form in (image, file.getvalue()):
        if is_good:
            assert load_image(form).size == size
        else:
            with pytest.raises(BadImage, match=f"thin image: .* has {size[0]} x {size[1]} pixels: one side is more"):
                load_image(form)
