"""Models that are no folder of transformers: those of open_clip by name, and vectors that somebody has computed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from llm2clip.data.images import load_image
from llm2clip.errors import UsageError, one_line, setting
from llm2clip.hub import LOAD_ERRORS

OPEN_CLIP, VECTORS = "open_clip:", "vectors:"
"""How such models are named."""


def is_foreign(name: str | None) -> bool:
    """Whether a name is one of these.

    >>> is_foreign("open_clip:ViT-B-32/openai"), is_foreign("openai/clip-vit-base-patch32")
    (True, False)
    """
    return (name or "").startswith((OPEN_CLIP, VECTORS))


def open_foreign(
    name: str, *, device: torch.device, dtype: torch.dtype | None = None, **_: Any
) -> OpenClipEncoder | StoredVectors:
    """Open one.

    Raises:
        UsageError: if there is none of that name, or open_clip is not installed.
    """
    if name.startswith(VECTORS):
        return StoredVectors(name.removeprefix(VECTORS))
    return OpenClipEncoder(name.removeprefix(OPEN_CLIP), device=device, dtype=dtype)


class OpenClipEncoder:
    """A model of open_clip, images and captions prepared as it says itself.

    Args:
        name: "ViT-B-32/laion2b_s34b_b79k" (architecture and weights, by name or as a file), "hf-hub:org/name", or
            "local-dir:folder".
        device: where it computes.
        dtype: its arithmetic; float32 by default.
    """

    def __init__(self, name: str, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
        try:
            import open_clip
        except ImportError:
            raise UsageError(f"{setting('model')} {OPEN_CLIP}{name} takes pip install 'llm2clip[metrics]'") from None
        plain = not name.startswith(("hf-hub:", "local-dir:"))
        architecture, _, weights = name.partition("/") if plain else (name, "", "")
        if plain and not weights:
            raise UsageError(f"{setting('model')} {OPEN_CLIP}{name} names no weights: write {name}/laion2b_s34b_b79k")
        try:
            self.model, self._transform = open_clip.create_model_from_pretrained(
                architecture, weights or None, device=device, weights_only=True
            )
            self._tokenizer = open_clip.get_tokenizer(architecture)
        except (*LOAD_ERRORS, AssertionError) as error:
            raise UsageError(f"{setting('model')} {OPEN_CLIP}{name} cannot be loaded: {one_line(error)}") from None
        self.model = self.model.to(dtype=dtype or torch.float32).eval()
        self._device, self._dtype = torch.device(device), dtype or torch.float32
        self.context, self.num_cut = int(getattr(self._tokenizer, "context_length", 77)), 0

    def prepare_image(self, image: Any) -> Tensor:
        """The normalised pixels [3, H, W] of an image."""
        pixels: Tensor = image if isinstance(image, Tensor) else self._transform(load_image(image))
        return pixels

    @torch.inference_mode()
    def encode_image(self, images: Sequence[Any], *, batch_size: int = 32) -> np.ndarray:
        """float32 [N, D] of unit length."""
        parts = [np.empty((0, 1), np.float32)]
        for start in range(0, len(images), batch_size):
            pixels = torch.stack([self.prepare_image(image) for image in images[start : start + batch_size]])
            parts.append(_unit(self.model.encode_image(pixels.to(self._device, self._dtype))))
        return np.concatenate(parts[1:] or parts)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """float32 [N, D] of unit length. A caption whose last token is not padding is taken for cut."""
        parts = [np.empty((0, 1), np.float32)]
        for start in range(0, len(texts), batch_size):
            tokens = self._tokenizer(list(texts[start : start + batch_size]))
            self.num_cut += int((tokens[:, -1] != 0).sum())
            parts.append(_unit(self.model.encode_text(tokens.to(self._device))))
        return np.concatenate(parts[1:] or parts)


def _unit(vectors: Tensor) -> np.ndarray:
    return normalize(vectors.float(), dim=-1).cpu().numpy()


class StoredVectors:
    """Vectors of a benchmark's images and texts that somebody has computed, with any model.

    Args:
        folder: images.npy [N, D] with images.txt, the images' names a line, as the benchmark's annotations have them or
            their last parts; texts.npy [M, D] with texts.jsonl, a JSON string a line.

    Raises:
        UsageError: if a file is not there, or not as long as its names.
    """

    def __init__(self, folder: str | Path) -> None:
        self.model, self._folder = self, Path(folder)
        self._images = self._load("images.npy", "images.txt")
        self._texts = {json.loads(line): row for line, row in self._load("texts.npy", "texts.jsonl").items()}

    def of_images(self, names: Sequence[str]) -> np.ndarray:
        """[n, D], a row a name."""
        rows = [self._images.get(name, self._images.get(name.rpartition("/")[2])) for name in names]
        return self._found(rows, names, "images.txt")

    def encode_text(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """[M, D], a row a text."""
        return self._found([self._texts.get(text) for text in texts], texts, "texts.jsonl")

    def prepare_image(self, image: Any) -> Any:
        """The image itself; vectors are found by name."""
        return image

    def encode_image(self, images: Sequence[Any], *, batch_size: int = 32) -> np.ndarray:
        """Likewise, of files by their names."""
        return self.of_images([getattr(image, "path", str(image)) for image in images])

    def _load(self, vectors: str, names: str) -> dict[str, np.ndarray]:
        try:
            rows = np.load(self._folder / vectors, mmap_mode="r", allow_pickle=False)
            lines = (self._folder / names).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except (OSError, ValueError) as error:
            raise UsageError(f"{setting('model')} {VECTORS}{self._folder}: {one_line(error)}") from None
        if rows.ndim != 2 or len(rows) != len(lines):
            raise UsageError(f"{self._folder}/{vectors} has shape {list(rows.shape)}, {names} {len(lines):,} lines")
        return dict(zip(lines, rows, strict=True))

    def _found(self, rows: Sequence[np.ndarray | None], names: Sequence[str], file: str) -> np.ndarray:
        missing = [name for name, row in zip(names, rows, strict=True) if row is None]
        if missing:
            raise UsageError(
                f"{self._folder}/{file} lacks {len(missing):,} of {len(names):,} that are scored, such as "
                f"{missing[0][:60]!r}"
            )
        return np.asarray(rows, dtype=np.float32)
