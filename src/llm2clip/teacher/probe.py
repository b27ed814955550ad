"""Can an encoder tell captions apart? Caption retrieval accuracy and the geometry of its vectors, before and after."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from llm2clip.data.sample import Sample
from llm2clip.metrics import caption_retrieval_accuracy, similarity_profile

CaptionSet = list[tuple[str, ...]]
"""The different captions of each image, in their order; at least two."""


def probe_captions(encode: Callable[[Sequence[str]], np.ndarray], captions: CaptionSet) -> dict[str, Any]:
    """How well `encode` tells the captions of different images apart.

    Args:
        encode: texts -> float vectors `[N, D]`.
        captions: of at least two images.

    Returns:
        `images`: how many; `cra_second`: an image's first caption finds its second among all second ones; `cra_all`:
        each caption finds another of its image among all others (both in 0..1, by chance 1 / images); and what
        `llm2clip.metrics.similarity_profile` says: alignment, uniformity, histograms.
    """
    flat = [text for texts in captions for text in texts]
    owners = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
    vectors = np.asarray(encode(flat), dtype=np.float32)
    return {
        "images": len(captions),
        "cra_second": caption_retrieval_accuracy(vectors, owners, pool="second"),
        "cra_all": caption_retrieval_accuracy(vectors, owners, pool="all"),
        **similarity_profile(vectors, owners),
    }


def first_captions(samples: Iterable[Sample], *, limit: int) -> CaptionSet:
    """The captions of the first `limit` samples that have two different ones."""
    chosen: CaptionSet = []
    for sample in samples:
        captions = tuple(dict.fromkeys(text for texts in sample.captions.values() for text in texts))
        if len(captions) > 1:
            chosen.append(captions)
        if len(chosen) == limit:
            break
    return chosen


def sampled_captions(rows: Any, *, limit: int, seed: int) -> CaptionSet:
    """The captions of `limit` rows of the stored training captions, drawn with `seed`; all if there are fewer."""
    numbers = random.Random(f"probe/{seed}").sample(range(len(rows)), min(limit, len(rows)))
    found = [tuple(dict.fromkeys(rows[i]["texts"])) for i in sorted(numbers)]
    return [captions for captions in found if len(captions) > 1]
