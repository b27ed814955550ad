"""A model as the evaluators of `evaluate` see it: vectors of images and of distinct captions; bad images counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2clip.data.bad import BadSamples
from llm2clip.data.feeder import THREADS, batched, encoded
from llm2clip.data.sample import ImageRef, Sample
from llm2clip.errors import LLM2CLIPError, setting
from llm2clip.eval.foreign import StoredVectors
from llm2clip.progress import Progress
from llm2clip.protocols import ImageEncoder, TextEncoder

BATCHES_AT_ONCE = 16
"""Batches of texts given to an encoder together; it may sort them by length."""


class Remembering:
    """An `llm2clip.protocols.Encoder` around a model: each image and text goes through it once, whoever asks.

    Args:
        model: encodes texts, and images if an evaluator asks for them.
        batch_size: images or texts in it at once.
        bad: where images are counted that cannot be read.
        device: where scores are computed.

    """

    def __init__(self, model: Any, *, batch_size: int, bad: BadSamples, device: torch.device) -> None:
        self.model, self.bad = model, bad
        self._batch_size, self._device = batch_size, device
        self._cut_before = getattr(model, "num_cut", 0)
        self._images: dict[ImageRef, np.ndarray] = {}
        self._texts: dict[str, np.ndarray] = {}

    @property
    def sees_images(self) -> bool:
        """Whether the model encodes images, too."""
        return isinstance(self.model, ImageEncoder)

    @property
    def num_cut(self) -> int | None:
        """How many texts the model read only the beginning of; None where it does not say."""
        return self.model.num_cut - self._cut_before if hasattr(self.model, "num_cut") else None

    @property
    def num_texts(self) -> int:
        """How many distinct texts were encoded."""
        return len(self._texts)

    def read(self, samples: Iterable[Sample]) -> list[Sample]:
        """The samples whose image can be read, encoded as they come.

        Raises:
            TooManyBadSamples: if too many cannot be read.
        """
        if isinstance(self.model, StoredVectors):
            good = list(samples)
            vectors = finite(self.model.of_images([sample.id for sample in good]), "images")
        else:
            good, vectors = encode_images(samples, self.model, batch_size=self._batch_size, bad=self.bad)
        self._images.update(zip((sample.image for sample in good), vectors, strict=True))
        return good

    def images(self, samples: Sequence[Sample]) -> tuple[list[int], Tensor]:
        """The numbers of those samples whose image can be read, and their vectors [n, D]."""
        if missing := [sample for sample in samples if sample.image not in self._images]:
            self.read(missing)
        numbers = [i for i, sample in enumerate(samples) if sample.image in self._images]
        return numbers, self._stacked([self._images[samples[i].image] for i in numbers])

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[N, D], a row a text."""
        if missing := [text for text in dict.fromkeys(texts) if text not in self._texts]:
            vectors = encode_captions(missing, self.model, batch_size=self._batch_size)
            self._texts.update(zip(missing, vectors, strict=True))
        return self._stacked([self._texts[text] for text in texts])

    def _stacked(self, rows: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(rows) if rows else np.empty((0, 1), np.float32)).to(self._device)


def encode_images(
    samples: Iterable[Sample], encoder: ImageEncoder, *, batch_size: int, bad: BadSamples, threads: int = THREADS
) -> tuple[list[Sample], np.ndarray]:
    """The samples whose image could be read, and the images' vectors [N, D]; the others are added to `bad`.

    Raises:
        TooManyBadSamples: if too many cannot be read.
    """
    good: list[Sample] = []
    parts: list[np.ndarray] = []
    with Progress(None, description="encode images", unit="images") as progress:
        for batch, vectors in encoded(samples, encoder, batch_size=batch_size, bad=bad, threads=threads):
            good += batch
            parts.append(finite(vectors, "images"))
            progress.advance(len(batch))
    return good, np.concatenate(parts) if parts else np.empty((0, 1), np.float32)


def encode_captions(texts: Sequence[str], encoder: TextEncoder, *, batch_size: int) -> np.ndarray:
    """Vectors [N, D] of texts, in their order; encoded longest first, so that texts of like length stand together."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    parts: list[np.ndarray] = []
    with Progress(len(texts), description="encode captions", unit="captions") as progress:
        for numbers in batched(order, batch_size * BATCHES_AT_ONCE):
            vectors = encoder.encode_text([texts[i] for i in numbers], batch_size=batch_size)
            parts.append(finite(vectors, "captions"))
            progress.advance(len(numbers))
    vectors = np.concatenate(parts)
    result = np.empty_like(vectors)
    result[order] = vectors
    return result


def finite(vectors: np.ndarray, what: str) -> np.ndarray:
    """`vectors`, if all their numbers are finite.

    Raises:
        LLM2CLIPError: naming how many rows are not.
    """
    bad = int((~np.isfinite(vectors).all(axis=1)).sum())
    if bad:
        raise LLM2CLIPError(
            f"the model gives NaN or infinity for {bad} of {len(vectors)} {what}; its weights are broken, or the "
            f"precision is too low for it: try {setting('precision', 'fp32')}"
        )
    return vectors
