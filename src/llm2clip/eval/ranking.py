"""Scores of ranked lists and how sure they are: average precision, nDCG, bootstrap over images; pure functions.

Letters: N images (or queries), P right pairs, S scores, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llm2clip.metrics import TIE
from llm2clip.protocols import Score

DRAWS = 1000
"""Samples of the images that an interval is made of."""
AT_ONCE = 20_000_000
"""Weights of draws held together: 80 MB."""
CERTAINTY = 95
"""Per cent of the draws that lie within an interval."""
Shares = tuple[np.ndarray, np.ndarray]


def places(rivals: np.ndarray, owners: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """The place, from 1, of each right pair in its query's list [P]; beyond the rivals known it is too good.

    Wrong ones within a tie stand first.

    Args:
        rivals: [N, k] cosines of each query's best wrong ones, best first.
        owners: [P] the query of each pair, rising.
        cosines: [P].

    >>> places(np.array([[0.9, 0.5]]), np.array([0, 0, 0]), np.array([0.7, 0.95, 0.5])).tolist()
    [3, 1, 5]
    """
    wrong = (rivals[owners] >= cosines[:, None] - TIE).sum(1)
    order = np.lexsort((-cosines, owners))
    first = np.searchsorted(owners, owners)
    among = np.empty(len(owners), dtype=np.int64)
    among[order] = np.arange(len(owners)) - first[order]
    return wrong + among + 1


def average_precision(found: np.ndarray, owners: np.ndarray, count: int, k: int = 10) -> np.ndarray:
    """AP@k of each query [N]: the mean over its right ones of the precision where each stands, 0 beyond k.

    >>> average_precision(np.array([1, 3, 12]), np.array([0, 0, 1]), 2).round(3).tolist()
    [0.833, 0.0]
    """
    order = np.lexsort((found, owners))
    own, place = owners[order], found[order]
    number = np.arange(len(own)) - np.searchsorted(own, own) + 1
    precision = np.where(place <= k, number / place, 0.0)
    return np.bincount(own, precision, count) / np.minimum(np.bincount(own, minlength=count), k)


def ndcg(found: np.ndarray, owners: np.ndarray, count: int, k: int = 10) -> np.ndarray:
    """NDCG@k of each query [N], as MIEB has it: a right one at place p counts 1 / log2(1 + p).

    >>> ndcg(np.array([1, 3, 2]), np.array([0, 0, 1]), 2).round(3).tolist()
    [0.92, 0.631]
    """
    gains = np.bincount(owners, np.where(found <= k, 1 / np.log2(1 + found), 0.0), count)
    best = np.concatenate([[0.0], np.cumsum(1 / np.log2(1 + np.arange(1, k + 1)))])
    return gains / best[np.minimum(np.bincount(owners, minlength=count), k)]


def median_rank(ranks: np.ndarray) -> float:
    """The rank that half of the queries reach.

    >>> median_rank(np.array([1, 9, 2]))
    2.0
    """
    return float(np.median(ranks))


def value(shares: Shares) -> float:
    """What counts by how much there is.

    >>> value((np.array([1.0, 2.0]), np.array([2, 4])))
    0.5
    """
    return float(shares[0].sum() / shares[1].sum())


def score_of(name: str, shares: Shares, chance: float | None = None) -> Score:
    """A score with what each image adds to it."""
    return Score(name, value(shares), chance, len(shares[0]), shares)


def by_image(hits: np.ndarray, owners: np.ndarray, count: int) -> Shares:
    """Shares of hits [P] of each image: a bootstrap draws images, with all that is theirs.

    >>> [part.tolist() for part in by_image(np.array([1, 0, 1]), np.array([0, 0, 1]), 2)]
    [[1.0, 1.0], [2.0, 1.0]]
    """
    return np.bincount(owners, hits, count), np.bincount(owners, minlength=count).astype(float)


def mean_of(parts: Sequence[Shares]) -> Shares:
    """Shares of the mean of several scores of the same images.

    >>> value(mean_of([(np.array([1.0, 1.0]), np.array([1, 1])), (np.array([0.0, 1.0]), np.array([2, 2]))]))
    0.625
    """
    total = sum(sums / counts.mean() for sums, counts in parts) / len(parts)
    return np.asarray(total), np.ones(len(parts[0][0]))


def mean_per_class(hits: np.ndarray, classes: np.ndarray) -> Shares:
    """Shares of the mean over classes of the accuracy in each.

    >>> value(mean_per_class(np.array([1, 1, 0, 0]), np.array([0, 0, 0, 1]))).__round__(3)
    0.333
    """
    _, number, counts = np.unique(classes, return_inverse=True, return_counts=True)
    return hits * len(hits) / (len(counts) * counts[number]), np.ones(len(hits))


def draws(parts: Sequence[Shares], *, seed: int = 0, count: int = DRAWS) -> np.ndarray:
    """Scores of samples of the images, drawn with replacement, the same for all [B, S]."""
    sums, totals = (np.stack([part[i] for part in parts], axis=1) for i in (0, 1))
    num_images = len(sums)
    generator = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    for start in range(0, count, size := max(1, AT_ONCE // num_images)):
        weights = np.empty((min(size, count - start), num_images), dtype=np.float32)
        for row in weights:
            row[:] = np.bincount(generator.integers(0, num_images, num_images), minlength=num_images)
        found.append((weights @ sums) / np.maximum(weights @ totals, 1e-12))
    return np.concatenate(found)


def intervals(parts: Sequence[Shares], *, seed: int = 0, count: int = DRAWS) -> list[tuple[float, float]]:
    """Where each true score lies with 95 % certainty: percentiles of scores of samples of the images.

    >>> [round(bound, 2) for bound in intervals([(np.repeat([0.0, 1.0], 50), np.ones(100))])[0]]
    [0.4, 0.6]
    """
    tail = (100 - CERTAINTY) / 2
    low, high = np.percentile(draws(parts, seed=seed, count=count), [tail, 100 - tail], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def differences(
    ours: Sequence[Shares], theirs: Sequence[Shares], *, seed: int = 0, count: int = DRAWS
) -> list[dict[str, float]]:
    """How each score of one model differs from another's on the same images.

    Returns:
        For each: the difference, its 95 % interval, and p: how often, two-sided, samples of the images give none or
        one of the other sign.

    >>> same = (np.repeat([0.0, 1.0], 50), np.ones(100))
    >>> differences([same], [same])[0]
    {'difference': 0.0, 'low': 0.0, 'high': 0.0, 'p': 1.0}
    """
    drawn = draws(ours, seed=seed, count=count) - draws(theirs, seed=seed, count=count)
    tail = (100 - CERTAINTY) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
    p = np.minimum(1.0, 2 * np.minimum((drawn <= 0).mean(0), (drawn >= 0).mean(0)))
    p = np.maximum(p, 1 / count)
    return [
        {
            "difference": round(value(a) - value(b), 6),
            "low": round(float(low[i]), 6),
            "high": round(float(high[i]), 6),
            "p": round(float(p[i]), 4),
        }
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
    ]


def differences_of(ours: Sequence[Score], theirs: Sequence[Score]) -> dict[str, dict[str, float]]:
    """How the scores of two models on the same images differ, by name; of those that say what each image adds."""
    others = {score.name: score.shares for score in theirs}
    pairs = {score.name: (score.shares, others.get(score.name)) for score in ours}
    both = {name: (a, b) for name, (a, b) in pairs.items() if a is not None and b is not None}
    if not both:
        return {}
    found = differences([a for a, _ in both.values()], [b for _, b in both.values()])
    return dict(zip(both, found, strict=True))
