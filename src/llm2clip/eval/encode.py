"""A model as the evaluators of `evaluate` see it: vectors of images and of distinct captions; bad images counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2clip.data.bad import BadSamples
from llm2clip.data.feeder import THREADS, batched, encoded
from llm2clip.data.sample import ImageRef, Sample
from llm2clip.errors import LLM2CLIPError, setting
from llm2clip.eval.cache import Features, image_key, text_key
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
        features: vectors of the model that are known already; new ones are added to them.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch_size: int,
        bad: BadSamples,
        device: torch.device,
        features: Features | None = None,
    ) -> None:
        self.model, self.bad, self._features = model, bad, features
        self._remembered = 0
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
        """How many texts the model read only the beginning of; None where it does not say, or did not read all."""
        counts = hasattr(self.model, "num_cut") and not self._remembered
        return self.model.num_cut - self._cut_before if counts else None

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
            self._images.update(zip((sample.image for sample in good), vectors, strict=True))
            return good
        met: list[Sample] = []
        good, vectors = encode_images(
            self._unknown(samples, met), self.model, batch_size=self._batch_size, bad=self.bad
        )
        for sample, vector in zip(good, vectors, strict=True):
            self._images[sample.image] = vector
            if self._features is not None and (key := image_key(sample.image)):
                self._features.put(key, vector)
        return [sample for sample in met if sample.image in self._images]

    def _unknown(self, samples: Iterable[Sample], met: list[Sample]) -> Iterator[Sample]:
        """Those whose image's vector lies nowhere; all go to `met`."""
        for sample in samples:
            met.append(sample)
            found = self._features.get(image_key(sample.image)) if self._features is not None else None
            if found is None:
                yield sample
            else:
                self._images[sample.image] = found

    def images(self, samples: Sequence[Sample]) -> tuple[list[int], Tensor]:
        """The numbers of those samples whose image can be read, and their vectors [n, D]."""
        if missing := [sample for sample in samples if sample.image not in self._images]:
            self.read(missing)
        numbers = [i for i, sample in enumerate(samples) if sample.image in self._images]
        return numbers, self._stacked([self._images[samples[i].image] for i in numbers])

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[N, D], a row a text."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if self._features is not None:
            known = {text: found for text in new if (found := self._features.get(text_key(text))) is not None}
            self._texts |= known
            self._remembered += len(known)
            new = [text for text in new if text not in known]
        if new:
            vectors = encode_captions(new, self.model, batch_size=self._batch_size)
            self._texts.update(zip(new, vectors, strict=True))
            if self._features is not None:
                for text, vector in zip(new, vectors, strict=True):
                    self._features.put(text_key(text), vector)
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
