"""Any encoded image as 8-bit RGB, upright, on white; and a quick look at its header alone.

Greyscale, CMYK, palette, 16-bit, alpha, animated and EXIF-turned images are ordinary; file extensions are ignored.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from llm2clip.data.bad import BadImage
from llm2clip.data.bytes import read_bytes
from llm2clip.data.sample import ImageRef

ImageSource = ImageRef | str | Path | bytes | Image.Image
MAX_PIXELS = 2 * 89_478_485
"""Larger images are taken for decompression bombs; where Pillow itself stops by default."""
MAX_RATIO = 100
"""Images with a longer side than so many shorter ones show nothing that a model would see."""
FORMATS = tuple("JPEG MPO PNG WEBP GIF BMP DIB TIFF AVIF JPEG2000 PPM ICO QOI HEIF".split())
"""Tried by content. Formats without a signature, and those that call another program to decode, stay out."""
DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, AttributeError),
    *(NotImplementedError, RuntimeError, MemoryError, struct.error, zlib.error),
)
"""What decoders raise on damaged bytes."""
HEAD_BYTES = 1 << 14
"""What nearly every image has its size in."""
ORIENTATION = 0x0112
"""The EXIF tag that says how an image is to be turned."""
HAS_TURBO = features.check("libjpeg_turbo")
"""Whether Pillow's JPEG library knows pixels of four bytes."""


def load_image(image: ImageSource, *, min_size: int | None = None) -> Image.Image:
    """The image decoded: mode RGB, first frame, upright, transparency on white, 16-bit values scaled to 8.

    Args:
        image: where it lies, a path, its encoded bytes, or an opened Pillow image (left as it is).
        min_size: the shorter side needed, in pixels. A JPEG is then decoded at 1/2, 1/4 or 1/8 of its size where that
            still gives as much, several times faster; `info["full_size"]` is its stored width and height. None: full
            size.

    Raises:
        BadImage: with the cause: missing file, empty image, not an image, truncated image, damaged image,
            decompression bomb, thin image.

    Example:
        >>> load_image(Image.new("LA", (4, 2), (0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    if isinstance(image, Image.Image):
        _check_size(image, "image")
        return _decode(image, name="image", min_size=None)
    if isinstance(image, bytes):
        data, name = image, f"{len(image)} bytes"
    else:
        ref = image if isinstance(image, ImageRef) else ImageRef(str(image))
        data, name = read_bytes(ref), _name(ref)
    return _decode(_open(io.BytesIO(data), name), name=name, min_size=min_size)


def check_header(file: IO[bytes], name: str) -> tuple[int, int]:
    """Width and height of an image, called `name` in errors, from its first bytes, nothing decoded.

    Raises:
        BadImage: if it is no image or too large; an image damaged further on is not noticed.
    """
    return _open(file, name).size


def check_file(path: str) -> tuple[int, int]:
    """Width and height of an image file from its header; BadImage if it is missing, empty or no image."""
    return check_place(ImageRef(path), path)


def check_place(ref: ImageRef, name: str) -> tuple[int, int]:
    """Width and height of an image, called `name` in errors, from its first bytes; if they do not do, from all."""
    head = read_bytes(ref, limit=HEAD_BYTES)
    try:
        return check_header(io.BytesIO(head), name)
    except BadImage:
        if len(head) < HEAD_BYTES:
            raise
    return check_header(io.BytesIO(read_bytes(ref)), name)


@functools.lru_cache
def known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this machine's Pillow and its plugins read."""
    Image.init()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of sizes at half our own limit, and of every odd EXIF tag
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(file: IO[bytes], name: str) -> Image.Image:
    try:
        image = Image.open(file, formats=known_formats())
    except UnidentifiedImageError:
        raise BadImage("not an image", f"{name} is in no known format") from None
    except Image.DecompressionBombError as error:
        raise BadImage("decompression bomb", f"{name}: {error}") from None
    except DECODE_ERRORS as error:
        raise _damage(error, name) from None
    _check_size(image, name)
    return image


def _check_size(image: Image.Image, name: str) -> None:
    what = f"{name} has {image.width} x {image.height} pixels"
    if not image.width * image.height:
        raise BadImage("damaged image", what)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("decompression bomb", what)
    if max(image.size) > MAX_RATIO * min(image.size):  # its shorter side resized for a model, it would fill the memory
        raise BadImage("thin image", f"{what}: one side is more than {MAX_RATIO} times the other")


def _decode(image: Image.Image, *, name: str, min_size: int | None) -> Image.Image:
    try:
        if image.format in ("JPEG", "MPO"):
            if min_size is not None:
                full_size = image.size
                image.draft(None, (min_size, min_size))
                image.info["full_size"] = full_size  # as stored: its eighth may be a fraction, which the size rounds up
            _decode_to_four_bytes(image)
        image.load()
        return _to_rgb(_upright(image))
    except DECODE_ERRORS as error:
        raise _damage(error, name) from None


def _decode_to_four_bytes(image: Any) -> None:
    """Let a JPEG be decoded to four bytes a pixel, as Pillow keeps it: the same colours without a loop over them."""
    if HAS_TURBO and len(image.tile) == 1 and image.tile[0][3] == ("RGB", ""):
        image.tile = [(*image.tile[0][:3], ("RGBX", ""))]


def _damage(error: BaseException, name: str) -> BadImage:
    cut_off = "truncated" in str(error).lower() or isinstance(error, EOFError)
    detail = " ".join(str(error).split()) or type(error).__name__
    return BadImage("truncated image" if cut_off else "damaged image", f"{name}: {detail}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except DECODE_ERRORS:  # damaged EXIF says nothing about the pixels: the image stands as it is
        return image
    if orientation == 1:
        return image
    bare = image.copy()
    bare.info.pop("exif", None)  # which Pillow would write anew, and fail where other tags are damaged
    bare.getexif()[ORIENTATION] = orientation
    return ImageOps.exif_transpose(bare)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep(image)
    keyed = "transparency" in image.info and image.mode in ("1", "L", "P", "RGB")
    if keyed or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        return _on_white(image)
    if image.mode == "RGB":
        return image
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """16-bit and float greyscale; Pillow's own conversion would clip at 255."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    top = values.max(initial=0.0)
    if image.mode.startswith("I;16") or top > 255:
        values = values / 257
    elif image.mode == "F" and top <= 1:
        values = values * 255
    grey = np.rint(values).clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    colours = image.convert("RGBA")
    white = Image.new("RGBA", colours.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, colours).convert("RGB")


def _name(ref: ImageRef) -> str:
    if ref.column:
        return f"{ref.path} row {ref.offset}"
    return f"{ref.path} at {ref.offset}" if ref.length >= 0 else ref.path
