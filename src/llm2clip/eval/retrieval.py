"""Retrieval on a named benchmark: all its scores from one pass over the cosines of each part, with shares by image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from llm2clip.data.sample import Sample
from llm2clip.eval.ranking import average_precision, by_image, mean_of, median_rank, ndcg, places, score_of
from llm2clip.metrics import match
from llm2clip.protocols import Encoder, Score
from llm2clip.scores import KS, chance_of_hit

DEPTH = 10
"""Of mean average precision and nDCG."""
CONTEXT = 77
"""What the first CLIPs read of a caption, in their own tokens."""


class NamedRetrieval:
    """Both ways between the images of a benchmark and its captions, by part, and the mean over parts.

    Args:
        samples: the benchmark, each with captions of each part.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.median_ranks: dict[str, float] = {}
        """"[<part>/]<i2t|t2i>" -> median rank, after a run."""

    def run(self, encoder: Encoder) -> Iterator[Score]:
        """R@k, mAP@10 and nDCG@10 both ways, and by the captions' length."""
        _, images = encoder.images(self.samples)
        parts: dict[str, list[Score]] = {}
        for part in self.samples[0].captions:
            scores = list(self._part(part, images, encoder))
            for score in scores:
                parts.setdefault(score.name, []).append(score)
            yield from (score._replace(name=f"{part}/{score.name}" if part else score.name) for score in scores)
        if len(self.samples[0].captions) > 1:
            yield from map(_mean, parts.values())

    def _part(self, part: str, images: Any, encoder: Encoder) -> Iterator[Score]:
        rows = [(number, text) for number, sample in enumerate(self.samples) for text in sample.captions[part]]
        owners, texts = np.array([number for number, _ in rows]), [text for _, text in rows]
        num, counts = len(self.samples), np.bincount(owners, minlength=len(self.samples))
        found = match(images, encoder.texts(texts), np.arange(num), owners, rivals=DEPTH)
        own, back = np.arange(num), found.ranks_back
        prefix = f"{part}/" if part else ""
        self.median_ranks |= {f"{prefix}i2t": median_rank(found.ranks), f"{prefix}t2i": median_rank(back)}
        for k in KS:
            yield score_of(f"i2t_r@{k}", by_image(found.ranks <= k, own, num), chance_of_hit(counts, len(texts), k))
            yield score_of(f"t2i_r@{k}", by_image(back <= k, owners, num), min(1.0, k / num))
        stand, each = places(found.rivals, found.owners, found.cosines), np.arange(len(back))
        for name, measure in (("map", average_precision), ("ndcg", ndcg)):
            yield score_of(f"i2t_{name}@{DEPTH}", by_image(measure(stand, found.owners, num, DEPTH), own, num))
            yield score_of(f"t2i_{name}@{DEPTH}", by_image(measure(back, each, len(back), DEPTH), owners, num))
        yield from _by_length(texts, back, owners, num)


def _mean(scores: Sequence[Score]) -> Score:
    shares = mean_of([score.shares for score in scores if score.shares is not None])
    chances = [score.chance for score in scores if score.chance is not None]
    return score_of(scores[0].name, shares, float(np.mean(chances)) if chances else None)


def _by_length(texts: Sequence[str], ranks: np.ndarray, owners: np.ndarray, num: int) -> Iterator[Score]:
    """Text to image R@1 of captions that a CLIP reads whole, and of longer ones, where there are both."""
    long = [len(text.encode()) + 2 > CONTEXT for text in texts]  # a token is a byte or more
    count = token_counter() if any(long) else None
    if count is None:
        return
    beyond = np.array([may_be and count(text) > CONTEXT for may_be, text in zip(long, texts, strict=True)])
    if beyond.any() and not beyond.all():
        for name, which in ((f"up-to-{CONTEXT}-tokens", ~beyond), (f"over-{CONTEXT}-tokens", beyond)):
            yield score_of(f"{name}/t2i_r@1", by_image(ranks[which] <= 1, owners[which], num))


@functools.lru_cache
def token_counter() -> Callable[[str], int] | None:
    """How many tokens the first CLIPs make of a text, its two marks included; None where open_clip is not installed."""
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError:
        return None
    tokenizer = SimpleTokenizer()
    return functools.lru_cache(maxsize=1 << 20)(lambda text: len(tokenizer.encode(text)) + 2)
