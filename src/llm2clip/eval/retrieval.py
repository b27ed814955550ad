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
LENGTHS = (20, 40, CONTEXT, 150, 300)
"""The most tokens of captions that are counted together."""


class NamedRetrieval:
    """Both ways between the images of a benchmark and its captions, by part, and the mean over parts.

    Args:
        samples: the benchmark, each with captions of each part.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.median_ranks: dict[str, float] = {}
        """"[<part>/]<i2t|t2i>" -> median rank, after a run."""
        self.by_length: list[dict[str, Any]] = []
        """Text to image R@1 of captions of like length, the shortest first, after a run; of languages there is none."""

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
        if (tokens := _lengths(texts)) is not None:
            self.by_length = [] if part else _bins(tokens, back)
            if len(set(tokens > CONTEXT)) == 2:
                for name, which in ((f"up-to-{CONTEXT}", tokens <= CONTEXT), (f"over-{CONTEXT}", tokens > CONTEXT)):
                    shares = by_image(back[which] <= 1, owners[which], num)
                    yield score_of(f"{name}-tokens/t2i_r@1", shares)


def _mean(scores: Sequence[Score]) -> Score:
    shares = mean_of([score.shares for score in scores if score.shares is not None])
    chances = [score.chance for score in scores if score.chance is not None]
    return score_of(scores[0].name, shares, float(np.mean(chances)) if chances else None)


def _lengths(texts: Sequence[str]) -> np.ndarray | None:
    """The tokens of each text; None where all are short for certain, or nobody counts."""
    if all(len(text.encode()) + 2 <= CONTEXT for text in texts):  # a token is a byte or more
        return None
    count = token_counter()
    return None if count is None else np.array([count(text) for text in texts])


def _bins(tokens: np.ndarray, ranks: np.ndarray) -> list[dict[str, Any]]:
    """Text to image R@1 of captions by their length in tokens; lengths that no caption has are left out.

    >>> _bins(np.array([9, 20, 400]), np.array([1, 2, 1]))
    [{'tokens': 'up to 20', 'captions': 2, 't2i_r@1': 0.5}, {'tokens': 'over 300', 'captions': 1, 't2i_r@1': 1.0}]
    """
    found, which = [], np.searchsorted(LENGTHS, tokens)
    for i in range(len(LENGTHS) + 1):
        own = ranks[which == i]
        name = f"up to {LENGTHS[0]}" if not i else f"over {LENGTHS[-1]}"
        if 0 < i < len(LENGTHS):
            name = f"{LENGTHS[i - 1] + 1} to {LENGTHS[i]}"
        if len(own):
            found.append({"tokens": name, "captions": len(own), "t2i_r@1": float((own <= 1).mean())})
    return found


@functools.lru_cache
def token_counter() -> Callable[[str], int] | None:
    """How many tokens the first CLIPs make of a text, its two marks included; None where open_clip is not installed."""
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError:
        return None
    tokenizer = SimpleTokenizer()
    return functools.lru_cache(maxsize=1 << 20)(lambda text: len(tokenizer.encode(text)) + 2)
