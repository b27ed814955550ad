"""Benchmarks in the real layouts with the real numbers of rows: tiny images that carry their number, an encoder."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from PIL import Image

from llm2clip.data.images import load_image

WIDTH, TIE = 12, 1e-6
CLEAR = np.random.default_rng(0).standard_normal((1 << 14, WIDTH)).astype(np.float32)
NOISE = np.random.default_rng(1).standard_normal((1 << 16, WIDTH)).astype(np.float32)


def image(number: int) -> bytes:
    """A PNG of one pixel, whose colour is its number."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1), (number >> 16, number >> 8 & 255, number & 255)).save(file, "PNG")
    return file.getvalue()


def number_in(found: Any) -> int:
    red, green, blue = load_image(found).getpixel((0, 0))
    return int(red << 16 | green << 8 | blue)


def text_vector(text: str) -> np.ndarray:
    """Near the vector of the image whose number stands in the text after "#"."""
    own = int(text.partition("#")[2].split()[0].rstrip("."))
    return CLEAR[own] + 0.8 * NOISE[crc32(text.encode()) % len(NOISE)]


class Numbered:
    """An encoder of such images and texts."""

    def prepare_image(self, image: Any) -> int:
        return number_in(image)

    def encode_image(self, images: Sequence[int], *, batch_size: int = 32) -> np.ndarray:
        return CLEAR[list(images)]

    def encode_text(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        return np.stack([text_vector(text) for text in texts])


def captions_of(count: int, total: int, *, word: str = "a view") -> list[list[str]]:
    """Captions of `count` images, `total` in all, as evenly as it goes."""
    left = [total // count + (number < total % count) for number in range(count)]
    return [[f"{word}, {k} of #{number} here." for k in range(many)] for number, many in enumerate(left)]


def expected(captions: Sequence[Sequence[str]], ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """R@k both ways in plain numpy; image i is number i."""
    owners = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
    texts = np.stack([text_vector(text) for own in captions for text in own])
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    images = CLEAR[: len(captions)] / np.linalg.norm(CLEAR[: len(captions)], axis=1, keepdims=True)
    to_text, to_image = [], []
    for start in range(0, len(images), 250):
        scores = images[start : start + 250] @ texts.T
        for row, number in zip(scores, range(start, len(images)), strict=False):
            own = owners == number
            to_text.append(1 + (row[~own] >= row[own].max() - TIE).sum())
    for start in range(0, len(texts), 1000):
        scores = texts[start : start + 1000] @ images.T
        right = np.take_along_axis(scores, owners[start : start + 1000, None], 1)
        to_image.extend((scores >= right - TIE).sum(1))
    ways = {"i2t": np.array(to_text), "t2i": np.array(to_image)}
    return {f"{way}_r@{k}": float((ranks <= k).mean()) for way, ranks in ways.items() for k in ks}


def write(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    """Loose files."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write_zip(path: Path, files: Mapping[str, bytes | str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_tar(path: Path, files: Mapping[str, bytes | str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def coco_json(names: Sequence[str], captions: Sequence[Sequence[str]]) -> str:
    """COCO's own form, its annotations in an order that is not the images'."""
    images = [{"id": 1000 + i, "file_name": name} for i, name in enumerate(names)]
    annotations = [
        {"image_id": 1000 + i, "id": 10 * i + k, "caption": text}
        for k in range(max(map(len, captions)))
        for i, own in enumerate(captions)
        for text in own[k : k + 1]
    ]
    return json.dumps({"images": images, "annotations": annotations})


def json_lines(rows: Iterable[Any]) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
