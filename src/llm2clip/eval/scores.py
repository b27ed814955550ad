"""The scores of one dataset from its vectors: retrieval both ways by kind of caption, and caption retrieval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from llm2clip.eval.encode import Captions
from llm2clip.metrics import caption_retrieval_accuracy, recall_both_ways, similarity_profile

KS = (1, 5, 10)


def retrieval_scores(images: Tensor, texts: Tensor, captions: Captions) -> tuple[dict[str, float], dict[str, float]]:
    """R@k both ways for each kind of caption, and what a model that knows nothing would get.

    Images without a caption of a kind are left out of that kind's pool.

    Args:
        images: [N, D], a row a sample.
        texts: [M, D], a row a distinct caption.
        captions: of the samples.

    Returns:
        Two dicts with the same keys, "<kind>/i2t_r@1" and so on: measured, and by chance.
    """
    scores, chance = {}, {}
    for kind, owners in captions.owners.items():
        pool = sorted(set(owners))
        to_text, to_image = recall_both_ways(images[pool], texts[captions.rows[kind]], pool, owners, KS)
        counts = np.unique(owners, return_counts=True)[1]
        for k in KS:
            scores[f"{kind}/i2t_r@{k}"] = to_text[k]
            scores[f"{kind}/t2i_r@{k}"] = to_image[k]
            chance[f"{kind}/i2t_r@{k}"] = chance_of_hit(counts, len(owners), k)
            chance[f"{kind}/t2i_r@{k}"] = min(1.0, k / len(pool))
    return scores, chance


def caption_scores(texts: Tensor, captions: Captions) -> dict[str, float]:
    """Caption retrieval accuracy over all captions ("cra"), from first to second ones ("cra_second"), and by kind.

    An image's equal captions count once. Left out where no image has two different ones.
    """
    scores = {}
    if _has_pairs(captions, list(captions.rows)):
        rows, owners = captions.distinct(captions.rows)
        scores["cra"] = caption_retrieval_accuracy(texts[rows], owners)
        scores["cra_second"] = caption_retrieval_accuracy(texts[rows], owners, pool="second")
    for kind in captions.rows:
        if len(captions.rows) > 1 and _has_pairs(captions, [kind]):
            rows, owners = captions.distinct([kind])
            scores[f"{kind}/cra"] = caption_retrieval_accuracy(texts[rows], owners)
    return scores


def similarity(texts: Tensor, captions: Captions, *, seed: int) -> dict[str, Any]:
    """Alignment, uniformity and histograms of caption similarities, see `llm2clip.metrics.similarity_profile`."""
    rows, owners = captions.distinct(captions.rows)
    return similarity_profile(texts[rows], owners, seed=seed)


def chance_of_hit(counts: Sequence[int] | np.ndarray, total: int, k: int) -> float:
    """How often k of `total` captions drawn at random hold one of an image's own, averaged over images.

    >>> round(chance_of_hit([5, 5], 10, 1), 3)
    0.5
    """
    misses = [math.comb(total - int(n), k) / math.comb(total, k) if total >= k else 0.0 for n in counts]
    return 1 - sum(misses) / len(misses)


def _has_pairs(captions: Captions, kinds: list[str]) -> bool:
    _, owners = captions.distinct(kinds)
    return bool(np.unique(owners, return_counts=True)[1].max() > 1)
