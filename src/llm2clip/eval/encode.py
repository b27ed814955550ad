"""A dataset through an encoder: vectors of its images and of each distinct caption; bad images counted."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llm2clip.data.bad import BadImage, BadSamples
from llm2clip.data.feeder import THREADS, batched, prepared
from llm2clip.data.sample import Sample
from llm2clip.errors import LLM2CLIPError, setting
from llm2clip.progress import Progress
from llm2clip.protocols import ImageEncoder, TextEncoder

BATCHES_AT_ONCE = 16
"""Batches of texts given to an encoder together; it may sort them by length."""


@dataclass
class Captions:
    """The captions of samples as rows of distinct texts.

    Attributes:
        texts: each distinct caption once.
        rows: kind -> row of each caption in `texts`.
        owners: kind -> number of the sample of each caption.
    """

    texts: list[str] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)
    owners: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Captions:
        """Those of `samples`, kinds in the order they are met."""
        captions, number = cls(), dict[str, int]()
        for owner, sample in enumerate(samples):
            for kind, texts in sample.captions.items():
                captions.rows.setdefault(kind, []).extend(number.setdefault(text, len(number)) for text in texts)
                captions.owners.setdefault(kind, []).extend([owner] * len(texts))
        captions.texts = list(number)
        return captions

    def distinct(self, kinds: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Rows and owners of captions of `kinds`, each text once for a sample: what caption retrieval is about."""
        pairs = itertools.chain.from_iterable(zip(self.owners[k], self.rows[k], strict=True) for k in kinds)
        unique = sorted(dict.fromkeys(pairs), key=lambda pair: pair[0])  # stable: a sample's captions keep their order
        owners, rows = zip(*unique, strict=True)
        return np.array(rows), np.array(owners)


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
        for batch in batched(_readable(samples, encoder, bad, ahead=batch_size, threads=threads), batch_size):
            good += [sample for sample, _ in batch]
            parts.append(finite(encoder.encode_image([pixels for _, pixels in batch], batch_size=batch_size), "images"))
            progress.advance(len(batch))
    return good, np.concatenate(parts) if parts else np.empty((0, 1), np.float32)


def _readable(
    samples: Iterable[Sample], encoder: ImageEncoder, bad: BadSamples, *, ahead: int, threads: int
) -> Iterator[tuple[Sample, Any]]:
    """The samples with their images as the encoder needs them; those that cannot be read are added to `bad`."""
    images = prepared(samples, lambda sample: encoder.prepare_image(sample.image), ahead=ahead, threads=threads)
    for number, (sample, image) in enumerate(images, start=1):
        try:
            pixels = image.result()
        except BadImage as error:
            bad.add(sample.id, error.cause, error.detail)
            bad.check(number, final=False)
        else:
            yield sample, pixels


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
