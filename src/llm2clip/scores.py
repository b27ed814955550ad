"""Retrieval among captioned images, as evaluators: both ways by kind of caption, and from caption to caption.

`evaluate` and the validation of a training run the same ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from llm2clip.metrics import caption_retrieval_accuracy, recall_both_ways
from llm2clip.protocols import Captioned, Encoder, Score

KS = (1, 5, 10)
CERTAINTY = 1.959964
"""Standard deviations on either side that hold 95 %."""


@dataclass
class Captions:
    """The captions of samples as rows of distinct texts.

    Attributes:
        texts: each distinct caption once.
        rows: kind -> row of each caption in `texts`.
        owners: kind -> number of the sample of each caption.
    """

    texts: list[Any] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)
    owners: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, samples: Iterable[Captioned]) -> Captions:
        """Those of `samples`, kinds in the order they are met."""
        captions, number = cls(), dict[Hashable, int]()
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


class Retrieval:
    """Images and captions that find each other: an evaluator.

    Args:
        samples: what is searched; images that cannot be read are left out, with their captions.
        ks: the cut-offs.
    """

    def __init__(self, samples: Sequence[Captioned], *, ks: Sequence[int] = KS) -> None:
        self.samples, self.ks = samples, ks

    def run(self, encoder: Encoder) -> Iterator[Score]:
        """R@k both ways for each kind of caption."""
        readable, images = encoder.images(self.samples)
        captions = Captions.of(self.samples[i] for i in readable)
        yield from retrieval_scores(images, encoder.texts(captions.texts), captions, self.ks)


class CaptionRetrieval:
    """Captions that find others of their image: an evaluator that needs no images."""

    def __init__(self, samples: Sequence[Captioned]) -> None:
        self.captions = Captions.of(samples)

    def run(self, encoder: Encoder) -> Iterator[Score]:
        """Caption retrieval accuracy; nothing where no image has two different captions."""
        yield from caption_scores(encoder.texts(self.captions.texts), self.captions)


def retrieval_scores(images: Tensor, texts: Tensor, captions: Captions, ks: Sequence[int] = KS) -> Iterator[Score]:
    """R@k both ways for each kind of caption: "<kind>/i2t_r@1" and so on; of captions of no kind "i2t_r@1".

    Images without a caption of a kind are left out of that kind's pool.

    Args:
        images: [N, D], a row a sample.
        texts: [M, D], a row a distinct caption.
        captions: of the samples.
        ks: the cut-offs.
    """
    for kind, owners in captions.owners.items():
        if not owners:
            continue
        pool, counts = np.unique(owners, return_counts=True)
        to_text, to_image = recall_both_ways(images[pool], texts[captions.rows[kind]], pool, owners, ks)
        prefix = f"{kind}/" if kind else ""
        for k in ks:
            chance = chance_of_hit(counts, len(owners), k)
            yield Score(f"{prefix}i2t_r@{k}", to_text[k], chance, len(pool))
            yield Score(f"{prefix}t2i_r@{k}", to_image[k], min(1.0, k / len(pool)), len(pool))


def caption_scores(texts: Tensor, captions: Captions) -> Iterator[Score]:
    """Caption retrieval accuracy over all captions ("cra"), from first to second ones ("cra_second"), and by kind.

    An image's equal captions count once. Left out where no image has two different ones.
    """
    every = list(captions.rows)
    pools = {"cra": every, **({f"{kind}/cra": [kind] for kind in every} if len(every) > 1 else {})}
    for name, kinds in pools.items():
        rows, owners = captions.distinct(kinds)
        counts = np.unique(owners, return_counts=True)[1]
        pairs = counts[counts > 1]
        if not len(pairs):
            continue
        by_chance = float((pairs * (pairs - 1)).sum() / pairs.sum() / (len(owners) - 1))
        yield Score(name, caption_retrieval_accuracy(texts[rows], owners), by_chance, len(pairs))
        if name == "cra":
            second = caption_retrieval_accuracy(texts[rows], owners, pool="second")
            yield Score("cra_second", second, 1 / len(pairs), len(pairs))


def chance_of_hit(counts: Sequence[int] | np.ndarray, total: int, k: int) -> float:
    """How often k of `total` captions drawn at random hold one of an image's own, averaged over images.

    >>> round(chance_of_hit([5, 5], 10, 1), 3)
    0.5
    """
    misses = [math.comb(total - int(n), k) / math.comb(total, k) if total >= k else 0.0 for n in counts]
    return 1 - sum(misses) / len(misses)


def interval(share: float, count: int) -> tuple[float, float]:
    """Where the true share lies with 95 % certainty, if `share` of `count` was seen (Wilson's score interval).

    >>> [round(bound, 3) for bound in interval(0.5, 100)], [round(bound, 3) for bound in interval(0.0, 10)]
    ([0.404, 0.596], [0.0, 0.278])
    """
    square = CERTAINTY**2 / count
    middle, half = share + square / 2, CERTAINTY * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))
